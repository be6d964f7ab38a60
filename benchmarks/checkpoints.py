"""What does a checkpoint cost: the stall of training, a whole save, a whole load, and a seek?

Stall: the time that ``CheckpointStore`` takes away from training when it saves in the background,
against a synchronous ``mx.save_safetensors`` of the same arrays. Save: against writing the arrays
with MLX, fsync and SHA-256 of the file. Load: against SHA-256 of the files plus ``mx.load``. Seek:
going to batch 1,000,000 against batch 10.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx_fit  # first: it may have to load a BLAS before mlx.core
from mlx_fit import CheckpointPolicy, DataLoader, Trainer

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip

from mlx_fit._tree import named_arrays  # isort: skip
from mlx_fit.checkpoint.format import read_checkpoint  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "7"))
WIDTH = 2048  # three square layers: 50 MB of weights, 151 MB with AdamW's state


def make_trainer() -> Trainer:
    mx.random.seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    mx.eval(model.parameters())
    return Trainer(model, optim.AdamW(1e-4), "mse", batch_size=8, seed=0)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def save_with_mlx(trainer: Trainer, folder: Path) -> None:
    for name, tree in (
        ("model", trainer.model.parameters()),
        ("optimizer", trainer.optimizer.state),
    ):
        mx.save_safetensors(str(folder / f"{name}.safetensors"), dict(named_arrays(tree)))


def sync_and_hash(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            hashlib.file_digest(file, "sha256")


def load_with_mlx(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        mx.eval(mx.load(str(path)))


def stalls(folder: Path, background: bool) -> float:
    """Seconds that a save adds to the step it falls on, the median over a fit's saves."""
    from mlx_fit import saving

    found: list[float] = []
    save = saving.Saver.save

    def timed(self: saving.Saver, *args: object) -> None:
        # The save before it is waited for outside: a real run saves less often than every step.
        self._writer.wait()
        found.append(seconds(lambda: save(self, *args)))

    saving.Saver.save = timed  # type: ignore[method-assign]
    try:
        x = np.ones((48, WIDTH), np.float32)
        policy = CheckpointPolicy("1 steps", keep_last=1, background=background)
        make_trainer().fit(
            (x, x), epochs=1, verbose=0, checkpoint_dir=folder, checkpoint_every=policy
        )
    finally:
        saving.Saver.save = save  # type: ignore[method-assign]
    return statistics.median(found)


def report(name: str, ours: list[float], theirs: list[float], limit: float) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    print(
        f"| {name} | {1e3 * statistics.median(ours):.1f} | {1e3 * statistics.median(theirs):.1f} | "
        f"{middle:.3f} ({min(ratios):.3f}-{max(ratios):.3f}) | {limit} |"
    )


def main() -> None:
    trainer = make_trainer()
    trainer.optimizer.init(trainer.model.trainable_parameters())
    mx.eval(trainer.optimizer.state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mlx").mkdir()
        rows: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            shutil.rmtree(folder / "mlx")
            (folder / "mlx").mkdir()
            plain = seconds(lambda: save_with_mlx(trainer, folder / "mlx"))
            rows.setdefault("plain", []).append(plain)
            rest = seconds(lambda: sync_and_hash(folder / "mlx"))
            rows.setdefault("plain and hash", []).append(plain + rest)
            shutil.rmtree(folder / "ours", ignore_errors=True)
            rows.setdefault("save", []).append(seconds(lambda: trainer.save(folder / "ours")))
            rows.setdefault("mlx load", []).append(seconds(lambda: load_with_mlx(folder / "ours")))
            rows.setdefault("load", []).append(seconds(lambda: read_checkpoint(folder / "ours")))
            shutil.rmtree(folder / "fit", ignore_errors=True)
            rows.setdefault("stall", []).append(stalls(folder / "fit", background=True))
        print("\n| | ours, ms | theirs, ms | ratio | limit |")
        print("|---|---|---|---|---|")
        report(
            "stall of training / synchronous mx.save_safetensors",
            rows["stall"],
            rows["plain"],
            0.15,
        )
        report(
            "save / mx.save_safetensors, fsync, SHA-256", rows["save"], rows["plain and hash"], 1.15
        )
        report("load / SHA-256, mx.load", rows["load"], rows["mlx load"], 1.15)
    loader = DataLoader((np.zeros((8_000_008, 1), np.float32),), 8, shuffle=True, seed=0)
    far, near = [], []
    for _ in range(ROUNDS):
        for batch, found in ((1_000_000, far), (10, near)):
            state = loader.state_dict() | {"epoch": 0, "samples_consumed": 8 * batch}

            def first(state: dict = state) -> None:
                loader.load_state_dict(state)
                next(iter(loader))

            found.append(seconds(first))
    report("first batch after seeking to number 1,000,000 / 10", far, near, 1.15)


if __name__ == "__main__":
    print(f"mlx {mx.__version__}, mlx_fit {mlx_fit.__version__}, {ROUNDS} rounds")
    main()
