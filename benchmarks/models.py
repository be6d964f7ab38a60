"""``fit`` against loops by hand and other trainers, on one device: MLP, ResNet-18, GPT of 125 M.

    python benchmarks/models.py            # sizes for a GPU
    python benchmarks/models.py --small    # the same code in seconds on a CPU

An epoch of each takes its turn in one process, over the same NumPy rows in the same precision:
``fit`` with a bar, a hand-written compiled MLX loop, and where they are installed PyTorch's loop,
Lightning and the Trainer of transformers (with accelerate), on PyTorch's GPU if MLX computes on
one. Printed are milliseconds a step and the ratio of ``fit`` to each: median, and all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx_fit  # first: it may have to load a BLAS before mlx.core
from mlx_fit.cli.bench_fit import EpochClock

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip

Epoch = Callable[[], float]
LEARNING_RATE = 1e-3
SIZES = {
    "mlp": {"width": 2048, "batch": 512},
    "resnet18": {"width": 64, "batch": 128},
    "gpt": {"width": 768, "layers": 12, "vocabulary": 50257, "length": 512, "batch": 8},
}
SMALL = {
    "mlp": {"width": 128, "batch": 64},
    "resnet18": {"width": 4, "batch": 8},
    "gpt": {"width": 64, "layers": 2, "vocabulary": 256, "length": 32, "batch": 4},
}


# --- MLX ------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, width: int, **_: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(784, width), nn.Linear(width, width)]
        self.head = nn.Linear(width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm(outputs)
        if stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.bn2(self.conv2(nn.relu(self.bn1(self.conv1(x)))))
        return nn.relu(y + (self.shortcut(x) if "shortcut" in self else x))


class ResNet(nn.Module):
    def __init__(self, width: int, **_: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm(width)
        shapes = [(width, width, 1), (width, width, 1)]
        for k in range(3):
            wide = width * 2 ** (k + 1)
            shapes += [(wide // 2, wide, 2), (wide, wide, 1)]
        self.blocks = [Block(*shape) for shape in shapes]
        self.head = nn.Linear(8 * width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        rows, length, width = x.shape
        parts = mx.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (p.reshape(rows, length, -1, 64).transpose(0, 2, 1, 3) for p in parts)
        seen = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
        x = x + self.out(seen.transpose(0, 2, 1, 3).reshape(rows, length, width))
        return x + self.down(nn.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int, length: int, **_: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.layers = [Layer(width) for _ in range(layers)]
        self.norm = nn.LayerNorm(width)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.tokens(x) + self.places(mx.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.tokens.as_linear(self.norm(x))


MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "resnet18": ResNet, "gpt": GPT}


def rows_of(name: str, size: dict[str, int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, images with channels last, and labels."""
    rng, count = np.random.default_rng(0), steps * size["batch"]
    if name == "gpt":
        tokens = rng.integers(0, size["vocabulary"], (count, size["length"] + 1)).astype(np.int32)
        return tokens[:, :-1], tokens[:, 1:]
    shape = (count, 784) if name == "mlp" else (count, 32, 32, 3)
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, 10, count).astype(np.int32)


def made(name: str, size: dict[str, int]) -> nn.Module:
    """A model in its precision: bfloat16 for the GPT."""
    mx.random.seed(0)
    model = MODELS[name](**size)
    if name == "gpt":
        model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def mlx_loop(name: str, size: dict[str, int], x: np.ndarray, y: np.ndarray) -> Epoch:
    model, optimizer = made(name, size), optim.AdamW(LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    def mean_loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x).astype(mx.float32), y).mean()

    def update(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, mean_loss)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    step, rng = partial(mx.compile, inputs=state, outputs=state)(update), np.random.default_rng(0)

    def epoch() -> float:
        start, order = time.perf_counter(), rng.permutation(len(x))
        for first in range(0, len(x), size["batch"]):
            rows = order[first : first + size["batch"]]
            loss = step(mx.array(x[rows]), mx.array(y[rows]))
            mx.async_eval(state, loss)
        mx.eval(state, loss)
        return time.perf_counter() - start

    return epoch


# --- PyTorch --------------------------------------------------------------------------------------


def torch_model(name: str, size: dict[str, int]) -> Any:
    """The same architecture; its images have channels first."""
    import torch
    from torch import nn as tnn
    from torch.nn import functional

    width = size["width"]

    class TorchBlock(tnn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = tnn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = tnn.BatchNorm2d(outputs)
            self.conv2 = tnn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = tnn.BatchNorm2d(outputs)
            down = tnn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = down if stride > 1 else tnn.Identity()

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            return functional.relu(y + self.shortcut(x))

    class TorchLayer(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = tnn.LayerNorm(width), tnn.LayerNorm(width)
            self.qkv, self.out = tnn.Linear(width, 3 * width), tnn.Linear(width, width)
            self.up, self.down = tnn.Linear(width, 4 * width), tnn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            rows, length, _ = x.shape
            parts = self.qkv(self.norm1(x)).chunk(3, -1)
            q, k, v = (p.view(rows, length, -1, 64).transpose(1, 2) for p in parts)
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class TorchGPT(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = tnn.Embedding(size["vocabulary"], width)
            self.places = tnn.Embedding(size["length"], width)
            self.layers = tnn.Sequential(*(TorchLayer() for _ in range(size["layers"])))
            self.norm = tnn.LayerNorm(width)

        def forward(self, x: Any) -> Any:
            x = self.tokens(x) + self.places.weight[: x.shape[1]]
            return self.norm(self.layers(x)) @ self.tokens.weight.T

    torch.manual_seed(0)
    if name == "gpt":
        return TorchGPT().to(torch.bfloat16)
    if name == "mlp":
        hidden = [tnn.Linear(784, width), tnn.ReLU(), tnn.Linear(width, width), tnn.ReLU()]
        return tnn.Sequential(*hidden, tnn.Linear(width, 10))
    blocks = [TorchBlock(width, width, 1), TorchBlock(width, width, 1)]
    for wide in (2 * width, 4 * width, 8 * width):
        blocks += [TorchBlock(wide // 2, wide, 2), TorchBlock(wide, wide, 1)]
    stem = [tnn.Conv2d(3, width, 3, 1, 1, bias=False), tnn.BatchNorm2d(width), tnn.ReLU()]
    ends = [tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(8 * width, 10)]
    return tnn.Sequential(*stem, *blocks, *ends)


def torch_loss(model: Any, batch: Any) -> Any:
    from torch.nn import functional

    x, y = batch
    return functional.cross_entropy(model(x).float().flatten(0, -2), y.long().flatten())


def torch_rivals(name: str, size: dict[str, int], x: np.ndarray, y: np.ndarray) -> dict[str, Epoch]:
    """The rivals of PyTorch that are installed and compute where MLX does."""
    try:
        import torch
    except ImportError:
        return {}
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if on_gpu and not torch.cuda.is_available():
        print("PyTorch has no GPU here: its loops are left out.")
        return {}
    device = "cuda" if on_gpu else "cpu"
    images = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
    rows = torch.utils.data.TensorDataset(torch.from_numpy(images), torch.from_numpy(y))
    rivals = {"PyTorch": torch_loop(name, size, rows, device)}
    for label, make in (("Lightning", lightning_trainer), ("HF Trainer", hugging_face)):
        try:
            rivals[label] = make(name, size, rows, device)
        except ImportError as error:
            print(f"{label} is left out: {error}")
    return rivals


def torch_loop(name: str, size: dict[str, int], rows: Any, device: str) -> Epoch:
    import torch

    model = torch_model(name, size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def batches() -> Iterator[Any]:
        order = torch.randperm(len(rows))
        for first in range(0, len(rows), size["batch"]):
            chosen = order[first : first + size["batch"]]
            yield [tensor[chosen].to(device) for tensor in rows.tensors]

    def epoch() -> float:
        start = time.perf_counter()
        for batch in batches():
            optimizer.zero_grad(set_to_none=True)
            loss = torch_loss(model, batch)
            loss.backward()
            optimizer.step()
        loss.item()
        return time.perf_counter() - start

    return epoch


def lightning_trainer(name: str, size: dict[str, int], rows: Any, device: str) -> Epoch:
    import logging

    import lightning
    import torch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_model(name, size)
            self.seconds = 0.0

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch_loss(self.model, batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), LEARNING_RATE)

        def on_train_epoch_start(self) -> None:
            self.seconds = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds

    module = Module()
    loader = torch.utils.data.DataLoader(rows, size["batch"], shuffle=True)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def epoch() -> float:
        accelerator = "gpu" if device == "cuda" else "cpu"
        lightning.Trainer(max_epochs=1, accelerator=accelerator, devices=1, **off).fit(
            module, loader
        )
        return module.seconds

    return epoch


def hugging_face(name: str, size: dict[str, int], rows: Any, device: str) -> Epoch:
    import accelerate  # noqa: F401  without it the Trainer fails only when it is made
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_model(name, size)

        def forward(self, x: Any, y: Any) -> Any:
            return {"loss": torch_loss(self.model, (x, y))}

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_epoch_begin(self, *args: Any, **options: Any) -> None:
            self.seconds = time.perf_counter()

        def on_epoch_end(self, *args: Any, **options: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds

    class Named(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            return dict(zip("xy", rows[index], strict=True))

    model, clock = WithLoss(), Clock()

    def epoch() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=size["batch"],
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                use_cpu=device == "cpu",
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
            )
            Trainer(model, arguments, train_dataset=Named(), callbacks=[clock]).train()
        return clock.seconds

    return epoch


# --- side by side ---------------------------------------------------------------------------------


class Turns(mlx_fit.Callback):
    """Runs an epoch of each rival after each of ``fit``."""

    def __init__(self, rivals: dict[str, Epoch]) -> None:
        self.rivals = rivals
        self.seconds: dict[str, list[float]] = {label: [] for label in rivals}

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        for label, run in self.rivals.items():
            self.seconds[label].append(run())


def compare(name: str, size: dict[str, int], steps: int, rounds: int) -> None:
    """Print a row for each that trains this model."""
    x, y = rows_of(name, size, steps)
    rivals = {"MLX by hand": mlx_loop(name, size, x, y), **torch_rivals(name, size, x, y)}
    model, clock, turns = made(name, size), EpochClock(), Turns(rivals)
    end = EpochClock(clock)
    trainer = mlx_fit.Trainer(
        model, optim.AdamW(LEARNING_RATE), "cross_entropy", batch_size=size["batch"]
    )
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with quiet[0], quiet[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit((x, y), epochs=rounds + 1, callbacks=[clock, end, turns], verbose=1)
    ours = [wall for wall, _ in end.seconds[1:]]
    print(f"| {name} | fit | {1e3 * statistics.median(ours) / steps:.2f} | |", flush=True)
    for label, seconds in turns.seconds.items():
        ratios = [a / b for a, b in zip(ours, seconds[1:], strict=True)]
        step_ms = 1e3 * statistics.median(seconds[1:]) / steps
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"| | {label} | {step_ms:.2f} | {spread} |", flush=True)


def versions() -> str:
    found = []
    for name in ("mlx", "torch", "lightning", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    info = mx.device_info() if mx.default_device().type == mx.DeviceType.gpu else {}
    return f"{info.get('device_name', mx.default_device())}, {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="default: all")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="to an epoch")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(versions())
    print("| model | trained by | ms a step | fit / it |\n|---|---|---|---|")
    for name in arguments.models or MODELS:
        size = (SMALL if arguments.small else SIZES)[name]
        compare(name, size, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
