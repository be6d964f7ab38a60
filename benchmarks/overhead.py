"""What does a step of a trainer cost over the loop by hand in its own framework?

    python benchmarks/overhead.py          # with the extra "bench": Keras, Lightning, skorch; "lm"

A small MLP with AdamW on batches of 32 rows in memory, so that a step is short. Each trainer is as
quiet as it can be made (no bar, logger or checkpoint), and is given batches that are ready where it
takes them, so that no collation counts. A step is the difference between a fit of twice the steps
and one of half of them: what a fit costs once is not in it. Printed are calls of Python functions a
step, and microseconds, over those of the loop by hand; medians, and the range of all rounds.
PyTorch runs on one thread, Keras on PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx_fit  # first: it may have to load a BLAS before mlx.core

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip

Fit = Callable[[int], object]  # trains so many steps
ROUNDS = int(os.environ.get("ROUNDS", "9"))
STEPS, COUNTED = 200, 20
ROWS, WIDTH, CLASSES = 32, 64, 10


def rows(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels for so many batches."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * ROWS, WIDTH)).astype(np.float32)
    return x, rng.integers(0, CLASSES, len(x))


X, Y = rows(2 * STEPS)


def mlx_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def mlx_pair() -> tuple[Fit, Fit]:
    """``fit``, and a compiled loop by hand."""
    trainer = mlx_fit.Trainer(mlx_model(), optim.AdamW(1e-3), "cross_entropy", batch_size=ROWS)

    def fit(steps: int) -> None:
        trainer.fit((X[: steps * ROWS], Y[: steps * ROWS]), verbose=0)

    model, optimizer = mlx_model(), optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y).mean()

    @partial(mx.compile, inputs=state, outputs=state)
    def update(x: mx.array, y: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, x, y)
        optimizer.update(model, gradients)
        return value

    def loop(steps: int) -> None:
        order = np.random.default_rng(0).permutation(steps * ROWS)
        for start in range(0, len(order), ROWS):
            some = order[start : start + ROWS]
            mx.eval(state, update(mx.array(X[some]), mx.array(Y[some])))

    return fit, loop


def torch_model() -> Any:
    import torch

    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, CLASSES)
    )


def torch_batches(steps: int) -> list[Any]:
    import torch

    x, y = torch.from_numpy(X[: steps * ROWS]), torch.from_numpy(Y[: steps * ROWS])
    return list(zip(x.split(ROWS), y.split(ROWS), strict=True))


def torch_loop() -> Fit:
    """PyTorch's loop by hand over batches that are ready."""
    import torch

    torch.set_num_threads(1)
    model = torch_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def loop(steps: int) -> None:
        for x, y in torch_batches(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return loop


def keras_pair() -> tuple[Fit, Fit]:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = [keras.layers.Dense(WIDTH, activation="relu"), keras.layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)

    def fit(steps: int) -> None:
        x, y = X[: steps * ROWS], Y[: steps * ROWS]
        model.fit(x, y, batch_size=ROWS, epochs=1, verbose=0)

    return fit, torch_loop()


def lightning_pair() -> tuple[Fit, Fit]:
    import lightning
    import torch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_model()

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")

    def fit(steps: int) -> None:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", log_every_n_steps=10**9, **dict.fromkeys(quiet, False)
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch_batches(steps), batch_size=None))

    return fit, torch_loop()


def transformers_pair() -> tuple[Fit, Fit]:
    import tempfile

    import torch
    import transformers

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_model()

        def forward(self, x: Any, labels: Any) -> Any:
            logits = self.model(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    model, folder = Model(), tempfile.mkdtemp()

    def fit(steps: int) -> None:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=1,
            learning_rate=1e-3,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=0.0,
        )
        data = [{"x": x, "labels": y} for x, y in torch_batches(steps)]
        Trainer(model, arguments, train_dataset=data).train()

    return fit, torch_loop()


def skorch_pair() -> tuple[Fit, Fit]:
    import skorch
    import torch

    def batches(dataset: Any, **_: Any) -> Any:
        return torch_batches(len(dataset) // ROWS)

    net = skorch.NeuralNet(
        torch_model(),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=1e-3,
        max_epochs=1,
        batch_size=ROWS,
        train_split=None,
        iterator_train=batches,
        verbose=0,
        warm_start=True,
    )

    def fit(steps: int) -> None:
        net.partial_fit(X[: steps * ROWS], Y[: steps * ROWS])

    return fit, torch_loop()


PAIRS = {
    "mlx-fit": mlx_pair,
    "keras": keras_pair,
    "lightning": lightning_pair,
    "transformers": transformers_pair,
    "skorch": skorch_pair,
}


def seconds_a_step(fit: Fit) -> float:
    """Of a step, without what a fit costs once."""

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        fit(steps)
        return time.perf_counter() - start

    return (seconds(2 * STEPS) - seconds(STEPS)) / STEPS


def calls_a_step(fit: Fit) -> float:
    """Calls of Python functions, this thread's; the least of three, some come from elsewhere."""
    count = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    def calls(steps: int) -> int:
        nonlocal count
        count = 0
        sys.setprofile(note)
        try:
            fit(steps)
        finally:
            sys.setprofile(None)
        return count

    return min(calls(2 * COUNTED) - calls(COUNTED) for _ in range(3)) / COUNTED


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing of what trainers have to say."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield


def installed(names: Sequence[str]) -> list[str]:
    """Those that are here, with their versions."""
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def main() -> None:
    names = [line.split()[0] for line in installed([*PAIRS])]
    print(", ".join(installed([*PAIRS, "mlx", "torch"])))
    print(f"batches of {ROWS} rows, {ROUNDS} rounds of {STEPS} steps")
    pairs = {}
    with silence():
        for name in names:
            pairs[name] = PAIRS[name]()
            for run in pairs[name]:
                run(STEPS)
        calls = {name: [calls_a_step(run) for run in pair] for name, pair in pairs.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name, (fit, loop) in pairs.items():
                times[name].append((seconds_a_step(fit), seconds_a_step(loop)))
    print(f"{'':<14}{'calls over':>11}{'us over':>9}{'all rounds':>16}{'loop, us':>10}{'ratio':>8}")
    for name, found in times.items():
        over = [1e6 * (ours - theirs) for ours, theirs in found]
        loop = 1e6 * statistics.median(theirs for _, theirs in found)
        median = statistics.median(over)
        spread = f"{min(over):.0f} to {max(over):.0f}"
        more, ratio = calls[name][0] - calls[name][1], 1 + median / loop
        print(f"{name:<14}{more:>11.0f}{median:>9.0f}{spread:>16}{loop:>10.0f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
