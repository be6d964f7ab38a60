"""The house rules that a program can check: who imports whom, and how long things are."""

from __future__ import annotations

import ast
import importlib
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import mlx_fit

ROOT = Path(mlx_fit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# The last layer; within it, too, each imports only what comes before.
RUN = [
    *("signals", "timing", "probing", "plan", "guard", "foresight", "pass_guard", "pass_steps"),
    *("loop", "passes", "saving", "resuming"),
    *("arguments", "preparing", "recorder", "ending", "fit_state", "fit", "stateful", "trainer"),
    "lightning",
    *("distributed", "cli"),
]
# Imports point down. A folder stands for all of its modules, which may import each other.
LAYERS = [
    {
        *(
            "errors",
            "batch",
            "logs",
            "protocols",
            "foreign",
            "sums",
            "checks",
            "messages",
            "_tree",
            "_version",
            "pace",
            "habits",
            "keywords",
        ),
        "_lazy",
    },
    {
        *("runtime", "state", "losses", "metrics", "schedules", "precision", "history"),
        *("data.order", "gradients", "weighting", "datasets", "rates", "modes", "trainable"),
        *("chunked_loss", "counted", "body_head"),
    },
    {
        *("data", "text", "objective", "options", "compiled", "step_state", "step", "splitting"),
        *("evaluation", "summary", "updating", "baked"),
        *("checkpoint", "finetune", "interop", "communicator", "causal_lm", "loggers"),
        *("head_apart", "preference", "dpo", "orpo"),
    },
    {"callbacks"},
    set(RUN),
]
SLOW_TO_IMPORT = [
    *("rich", "tensorboardX", "torch", "safetensors", "matplotlib", "transformers", "tokenizers"),
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tree_of(path):
    return ast.parse(path.read_text())


def unit_of(module):
    """The entry of the table that a module falls under, and its layer."""
    for name in (module, module.split(".")[0]):
        for number, layer in enumerate(LAYERS):
            if name in layer:
                return name, number
    pytest.fail(f"mlx_fit.{module} has no layer; add it to the table.")


def project_imports(tree):
    """Modules of this project that a piece of code imports, without ``mlx_fit.``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "mlx_fit"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            if module.split(".")[0] == "mlx_fit":
                found |= {resolved(module, alias.name) for alias in node.names}
    return {name.removeprefix("mlx_fit").removeprefix(".") for name in found}


def resolved(module, name):
    """``from module import name``: the submodule if there is one, else the module."""
    path = ROOT.parent.joinpath(*module.split("."), name)
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else module


def test_the_table_holds_every_module():
    names = [name for path in FILES if (name := name_of(path))]
    assert all(unit_of(name) for name in names)


@pytest.mark.parametrize("path", [f for f in FILES if name_of(f)], ids=name_of)
def test_imports_point_down(path):
    tree, module = tree_of(path), name_of(path)
    unit, layer = unit_of(module)
    for imported in sorted(project_imports(tree)):
        other, below = unit_of(imported)
        assert below <= layer, f"mlx_fit.{module} imports mlx_fit.{imported}, from a layer above"
        if below == layer and other != unit:
            assert_allowed_beside(unit, other, tree)


def assert_allowed_beside(unit, other, tree):
    """Layer 2 imports what its docstring names, layer 4 what comes earlier, others nothing."""
    if other in LAYERS[4]:
        assert RUN.index(other) < RUN.index(unit), f"{unit} imports {other}"
    elif other in LAYERS[2]:
        assert other in (ast.get_docstring(tree) or ""), f"{unit}'s docstring does not name {other}"
    else:
        assert other in LAYERS[0], f"{unit} and {other} are of one layer"


@pytest.mark.parametrize(
    "path", [f for f in FILES if name_of(f).split(".")[0] in ("data", "text")], ids=name_of
)
def test_data_modules_name_the_layer_2_modules_they_import(path):
    tree = tree_of(path)
    if path.name != "__init__.py":
        for imported in project_imports(tree):
            if unit_of(imported)[1] == 2:
                assert imported in (ast.get_docstring(tree) or "").replace("``", "")


def test_there_are_no_cycles():
    graph = {name_of(path): project_imports(tree_of(path)) for path in FILES}
    done, path = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in path, f"a cycle: {' -> '.join([*path, module])}"
        path.append(module)
        for imported in graph.get(module, ()):
            visit(imported)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_no_function_imports_from_the_project():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert not project_imports(node), f"{path}:{node.lineno} {node.name}"


def test_callbacks_do_not_see_the_trainer():
    for path in (ROOT / "callbacks").glob("*.py"):
        assert not {unit_of(name)[0] for name in project_imports(tree_of(path))} & LAYERS[4]


def test_only_one_module_compiles():
    """The doctor apart, which tries whether compiling works."""
    found = {name_of(path) for path in FILES if "mx.compile(" in code_text(path)}
    assert found == {"compiled", "cli.doctor"}


def test_importing_loads_nothing_that_is_slow_or_optional():
    code = (
        "import json, sys, mlx_fit\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert not set(json.loads(done.stdout)) & set(SLOW_TO_IMPORT)


def test_importing_sets_nothing_up():
    """No device is chosen, no random key drawn, no handler or logger installed."""
    code = (
        "import logging, random, signal, threading, warnings\n"
        "import mlx.core as mx\n"
        "def look(): return (mx.default_device(), mx.random.state[0].tolist(), random.getstate(),\n"
        "    signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),\n"
        "    logging.root.handlers[:], warnings.filters[:], threading.active_count())\n"
        "import numpy, dataclasses\n"
        "warnings.simplefilter('ignore')\n"
        "before = look()\n"
        "import mlx_fit\n"
        "assert look() == before, (look(), before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


# --- lengths --------------------------------------------------------------------------------------


def code_lines(path):
    """Numbers of the lines that hold code: no comments, docstrings or blank lines."""
    docstrings = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in skipped and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def code_text(path):
    kept = code_lines(path)
    lines = path.read_text().splitlines()
    return "\n".join(line for number, line in enumerate(lines, 1) if number in kept)


def function_lengths():
    for path in FILES:
        lines = code_lines(path)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = sum(node.lineno <= line <= node.end_lineno for line in lines)
                yield length, f"{name_of(path)}.{node.name}"


def test_no_file_has_more_than_400_lines_of_code():
    long = {name_of(path): len(code_lines(path)) for path in FILES}
    assert not {name: length for name, length in long.items() if length > 400}


def test_no_function_has_more_than_60_lines_of_code_and_few_more_than_40():
    lengths = sorted(function_lengths(), reverse=True)
    assert not [(length, name) for length, name in lengths if length > 60]
    assert lengths[len(lengths) // 20][0] <= 40


def test_the_way_of_a_batch_is_read_in_one_sitting():
    """loader, loop, step and progress: under 700 lines of code together."""
    way = ["data/loader.py", "loop.py", "step.py", "callbacks/progress.py"]
    assert sum(len(code_lines(ROOT / name)) for name in way) < 700


LAZY = [ROOT / "__init__.py", ROOT / "callbacks" / "__init__.py", ROOT / "data" / "__init__.py"]


@pytest.mark.parametrize("path", LAZY, ids=name_of)
def test_what_is_imported_lazily_is_what_type_checkers_see(path):
    """Two lists of one thing, and ``__all__``: they agree, and each name is there."""
    package = ".".join(["mlx_fit", name_of(path)]).rstrip(".")
    block = next(node for node in tree_of(path).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    module = importlib.import_module(package)
    at_once = {
        alias.asname or alias.name
        for node in tree_of(path).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } - {"lazy", "TYPE_CHECKING", "_blas"}
    assert not at_once & {*seen}
    assert {*seen} | at_once == {*module.__all__}
    for name, home in seen.items():
        found = getattr(module, name)
        expected = importlib.import_module(f"{home}.{name}" if home == package else home)
        assert found is (expected if home == package else getattr(expected, name)), name
    assert all(isinstance(name, str) and hasattr(module, name) for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        _ = module.Trianer


def test_importing_imports_little():
    code = "import sys, mlx_fit; print(sum(name.startswith('mlx_fit') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10
