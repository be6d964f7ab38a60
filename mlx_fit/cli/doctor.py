"""Show what MLX runs on here, how fast its BLAS is, and what could be better."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit._version import __version__
from mlx_fit.runtime import blas, device, memory

_SIDE = 1024  # of the square matrices whose product is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit doctor``."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--fix-blas",
        action="store_true",
        help="write a .pth file into this virtual environment, so that every program there loads "
        "a fast BLAS before MLX (Linux)",
    )
    action.add_argument("--unfix-blas", action="store_true", help="remove that file again")
    action.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--force", action="store_true", help="with --fix-blas: outside a virtual environment too"
    )


def run(arguments: argparse.Namespace) -> int:
    """Report, or fix. Returns 0, 1 if something is broken, 2 for wrong usage."""
    if arguments.force and not arguments.fix_blas:
        print("mlx-fit doctor: --force goes with --fix-blas only", file=sys.stderr)
        return 2
    if arguments.fix_blas:
        return _fix(arguments.force)
    if arguments.unfix_blas:
        removed = blas.remove_pth()
        print("\n".join(f"Removed {path}" for path in removed) or "There was nothing to remove.")
        return 0
    facts = report()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 1 if facts["broken"] else 0


def report() -> dict[str, Any]:
    """Everything the doctor shows; ``broken`` and ``advice`` list findings with their remedies."""
    facts: dict[str, Any] = {
        "versions": {
            "mlx_fit": __version__,
            "mlx": version("mlx"),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "memory": {
            "limit_bytes": memory.limit_bytes(),
            "mlx_limit_bytes": mx.get_memory_limit(),
            "active_bytes": memory.active_bytes(),
            "cache_bytes": memory.cache_bytes(),
            "process_rss_bytes": memory.process_rss_bytes(),
        },
        "devices": device.available(),
        "default_device": mx.default_device().type.name,
        "blas": vars(blas.status()) | {"pth": _installed_pth()},
        "gflops": speeds(),
        "compiler": _compiler(),
        "compile_error": _compile_error(),
        "compile_cache": _compile_cache(),
    }
    facts["broken"] = _broken(facts)
    facts["advice"] = _advice(facts)
    return facts


# --- Fixing --------------------------------------------------------------------------------------


def _fix(force: bool) -> int:
    if not sys.platform.startswith("linux") or blas.replaced_name() is None:
        print("Nothing to fix: this MLX does not bring the slow reference BLAS.")
        return 0
    try:
        written = blas.install_pth(force)
    except (RuntimeError, OSError) as error:
        print(f"mlx-fit doctor: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"Wrote {path}")
    # A fresh process tells whether it works, as any program that imports MLX alone.
    probe = (
        "import mlx.core, sys, json; "
        f"print(json.dumps(vars(sys.modules[{blas.LOADER!r}].status())))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode:
        print(f"mlx-fit doctor: a fresh process fails:\n{done.stderr}", file=sys.stderr)
        return 1
    found = blas.Status(**json.loads(done.stdout))
    if found.library is None:
        print(f"But programs here load no fast BLAS: {found.reason}", file=sys.stderr)
        return 1
    print(f"Programs of this environment now load {found.source} before MLX: {found.library}")
    return 0


# --- Finding out ---------------------------------------------------------------------------------


def _installed_pth() -> str | None:
    path = blas.pth_path()
    return str(path) if path.exists() else None


def speeds() -> dict[str, dict[str, float]]:
    """By device: GFLOP/s of a float32 product, and its largest relative error against NumPy."""
    values = np.random.default_rng(0).standard_normal((2, _SIDE, _SIDE)).astype(np.float32)
    exact = values[0] @ values[1]
    speeds = {}
    for name, kind in (("cpu", mx.cpu), ("gpu", mx.gpu)):
        if not mx.is_available(kind):
            continue
        left, right = mx.array(values[0]), mx.array(values[1])
        mx.eval(left, right)
        seconds: list[float] = []
        while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 0.5):
            start = time.perf_counter()
            product = mx.matmul(left, right, stream=kind)
            mx.eval(product)
            seconds.append(time.perf_counter() - start)
        error = np.abs(np.array(product) - exact).max() / np.abs(exact).max()
        speeds[name] = {"gflops": 2 * _SIDE**3 / min(seconds) / 1e9, "error": float(error)}
    return speeds


def _compiler() -> str | None:
    """Path and version of g++, the one program MLX asks for to compile functions for the CPU."""
    path = shutil.which("g++")
    if path is None:
        return None
    told = subprocess.run(
        [path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
    )
    return f"{path} {told.stdout.strip()}".strip()


def _compile_error() -> str | None:
    """What a compiled function on the CPU raises, or None if its result is right."""
    values = mx.array([0.0, 1.0])
    try:
        with device.DeviceConfig(device="cpu").applied():
            result = mx.compile(lambda x: mx.exp(x) * 2 + 1)(values).tolist()
    except RuntimeError as error:
        return str(error)
    return None if np.allclose(result, [3.0, 6.43656366]) else f"a wrong result, {result}"


def _compile_cache() -> dict[str, Any]:
    # C++'s temp_directory_path() asks these four, in this order.
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    root = next((os.environ[name] for name in names if os.environ.get(name)), "/tmp")
    folder = Path(root, "mlx", version("mlx"), "cpu")
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    return {"path": str(folder), "num_files": len(sizes), "bytes": sum(sizes)}


# --- Judging -------------------------------------------------------------------------------------


def _finding(text: str, command: str) -> dict[str, str]:
    return {"text": text, "command": command}


def _broken(facts: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    if facts["blas"]["failed"]:
        named = bool(os.environ.get(blas.VARIABLE))
        command = f"unset {blas.VARIABLE}" if named else blas.INSTALL_COMMAND
        found.append(_finding(f"No fast BLAS: {facts['blas']['reason']}", command))
    for name, speed in facts["gflops"].items():
        # TF32 on a GPU is right to 1e-3.
        if not speed["error"] < 1e-2:
            found.append(
                _finding(
                    f"A product on the {name} is wrong by {speed['error']:.2g} of its largest "
                    "value.",
                    "export MLX_FIT_BLAS=off" if name == "cpu" else "pip install -U mlx",
                )
            )
    if facts["compile_error"]:
        found.append(
            _finding(
                f"mx.compile fails on the CPU: {facts['compile_error']}",
                "export MLX_DISABLE_COMPILE=1",
            )
        )
    return found


def _advice(facts: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    status = facts["blas"]
    slow = sys.platform.startswith("linux") and blas.replaced_name() is not None
    if slow and os.environ.get(blas.VARIABLE) == "off":
        found.append(_finding("MLX_FIT_BLAS=off: MLX's own BLAS is slow.", "unset MLX_FIT_BLAS"))
    elif slow and status["library"] is None and not status["failed"]:
        found.append(_finding("MLX computes with its slow reference BLAS.", blas.INSTALL_COMMAND))
    elif slow and status["library"] is not None and status["pth"] is None:
        found.append(
            _finding(
                "A program that imports mlx before mlx_fit computes with MLX's slow BLAS.",
                blas.FIX_COMMAND,
            )
        )
    if status["library"] is not None and status["reason"]:
        found.append(_finding(status["reason"], "export XDG_CACHE_HOME=/a/folder/of/yours"))
    if facts["compiler"] is None:
        found.append(
            _finding(
                "There is no g++ on PATH: without it mx.compile silently runs eagerly on the CPU.",
                "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++",
            )
        )
    if os.environ.get("MLX_DISABLE_COMPILE"):
        found.append(_finding("mx.compile is switched off.", "unset MLX_DISABLE_COMPILE"))
    if "gpu" not in facts["gflops"] and Path("/proc/driver/nvidia/version").exists():
        found.append(_finding("The NVIDIA GPU is not used.", "pip install 'mlx[cuda12]'"))
    if facts["compile_cache"]["bytes"] > 2**30:
        found.append(
            _finding("Compiled functions fill the disk.", f"rm -r {facts['compile_cache']['path']}")
        )
    return found


# --- Showing -------------------------------------------------------------------------------------


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console.print(table)
    for title, style in (("broken", "bold red"), ("advice", "bold yellow")):
        if facts[title]:
            heading = {"broken": "What is broken", "advice": "What could be better"}[title]
            console.print(f"\n{heading}", style=style)
        for finding in facts[title]:
            console.print(Text(finding["text"]))
            # Not wrapped, so that it can be copied.
            console.print(Text(f"    {finding['command']}"), style="cyan", soft_wrap=True)
    if not facts["broken"] and not facts["advice"]:
        console.print("\nAll is well.", style="bold green")


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    versions, status, cache = facts["versions"], facts["blas"], facts["compile_cache"]
    sizes = {name: memory.format_bytes(size) for name, size in facts["memory"].items()}
    packages = ", ".join(f"{name} {versions[name]}" for name in ("mlx_fit", "mlx", "numpy"))
    loaded = {
        "pth": f"{status['source']}, loaded before MLX by the .pth file",
        "import": f"{status['source']}, loaded by importing mlx_fit before MLX",
        "none": f"MLX's own ({'see below' if status['failed'] else status['reason']})",
    }[status["loaded_by"]]
    speeds = ", ".join(f"{name} {speed['gflops']:.0f}" for name, speed in facts["gflops"].items())
    return [
        ("Versions", f"{packages}, Python {versions['python']}"),
        ("System", versions["system"]),
        ("Devices", f"{', '.join(facts['devices'])}; default {facts['default_device']}"),
        ("BLAS", loaded),
        *([("", status["library"])] if status["library"] else []),
        (".pth file", status["pth"] or "none"),
        ("Product", f"{speeds} GFLOP/s (float32, {_SIDE} x {_SIDE} x {_SIDE})"),
        ("Compiler", facts["compiler"] or "none"),
        ("Memory", f"MLX can hold {sizes['limit_bytes']} (its limit {sizes['mlx_limit_bytes']})"),
        ("", f"it holds {sizes['active_bytes']}, and {sizes['cache_bytes']} for reuse"),
        ("", f"this process {sizes['process_rss_bytes']}"),
        ("Compile cache", cache["path"]),
        ("", f"{cache['num_files']} files, {memory.format_bytes(cache['bytes'])}"),
    ]
