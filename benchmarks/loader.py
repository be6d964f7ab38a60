"""What does a batch cost, against PyTorch's DataLoader with no and with two workers, and mlx-data?

Images: 60,000 of 28 x 28 pixels in memory (uint8) to float batches of 64. Tokens: 100,000 lists to
padded batches of 64. Slow rows: a Python transform of about 1 ms a row. Ours and theirs run in
turn, an epoch each; workers are started before the clock runs. Also the memory of an epoch over a
memory-mapped file.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from mlx_fit.data import DataLoader, MapBatches, from_mlx_data, open_arrays
from mlx_fit.text import BucketBatches

ROUNDS = int(os.environ.get("ROUNDS", "5"))
FILE_MB = int(os.environ.get("FILE_MB", "2000"))
BATCH_SIZE = 64


class Images(torch.utils.data.Dataset):
    """Float images and labels, row by row, as one writes it for PyTorch."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.x[index].astype(np.float32) / 255, int(self.y[index])


class SlowRows(torch.utils.data.Dataset):
    """Rows that keep Python busy for about a millisecond each."""

    def __len__(self) -> int:
        return 2_000

    def __getitem__(self, index: int) -> np.ndarray:
        total = 0
        for number in range(30_000):
            total += number
        return np.full(1000, total % 7 + index, np.float32)


def scaled(
    batch: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    return batch[0].astype(np.float32) / 255, batch[1]


def padded(rows: list[list[int]]) -> np.ndarray:
    batch = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for position, row in enumerate(rows):
        batch[position, : len(row)] = row
    return batch


def padded_tensor(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(padded(rows))


def text_tensors(rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """What a batch of ours holds: tokens, targets, weights, segments."""
    shape = len(rows), max(len(tokens) for tokens, _ in rows)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for position, (row, mask) in enumerate(rows):
        tokens[position, : len(row)], targets[position, : len(row) - 1] = row, row[1:]
        weights[position, : len(row) - 1], segments[position, : len(row)] = mask[1:], 1
    return [torch.from_numpy(part) for part in (tokens, targets, weights, segments)]


def milliseconds(loader: Iterable[object]) -> float:
    """Milliseconds a batch, of an epoch after its first batch.

    Starting workers does not count: those that persist are started by an epoch before.
    """
    if getattr(loader, "persistent_workers", False):
        list(loader)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return 1e3 * (time.perf_counter() - start) / count


def compare(name: str, ours: Callable[[], Iterable], theirs: Callable[[], Iterable]) -> None:
    pairs = [(milliseconds(ours()), milliseconds(theirs())) for _ in range(ROUNDS)]
    ratios = [their / our for our, their in pairs]
    our, their = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"| {name} | {our:.3f} | {their:.3f} | {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f}-{max(ratios):.1f}) |",
        flush=True,
    )


def torch_loader(dataset: torch.utils.data.Dataset, **options: object) -> Iterable:
    return torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, **options)


def mlx_data_images(x: np.ndarray, y: np.ndarray, num_threads: int) -> Iterable | None:
    """The images by mlx-data, scaled by whole batches; None where it is not installed."""
    try:
        import mlx.data as mlx_data
    except ImportError:
        return None
    samples = [{"x": image, "y": label} for image, label in zip(x, y, strict=True)]
    stream = mlx_data.buffer_from_vector(samples).shuffle().to_stream().batch(BATCH_SIZE)
    stream = stream.key_transform("x", lambda images: images.astype(np.float32) / 255)
    return from_mlx_data(stream.prefetch(8, num_threads) if num_threads else stream)


def mlx_data_tokens(rows: list[list[int]], num_threads: int) -> Iterable | None:
    """The tokens alone by mlx-data, padded; None where it is not installed."""
    try:
        import mlx.data as mlx_data
    except ImportError:
        return None
    samples = [{"tokens": np.array(row, np.int32)} for row in rows]
    stream = mlx_data.buffer_from_vector(samples).shuffle().to_stream().batch(BATCH_SIZE)
    return from_mlx_data(stream.prefetch(8, num_threads) if num_threads else stream)


def anonymous_mb() -> float:
    """Memory of this process that is not mapped from files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return float("nan")


def mapped_epoch() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        shape = (FILE_MB * 1_000_000 // 4000, 1000)
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        loader = DataLoader(open_arrays(path), BATCH_SIZE, shuffle=True, seed=0)
        batches = iter(loader)
        next(batches)
        start, before, peak = time.perf_counter(), anonymous_mb(), 0.0
        for number, _ in enumerate(batches):
            if number % 100 == 0:
                peak = max(peak, anonymous_mb())
        seconds = time.perf_counter() - start
        print(
            f"\nAn epoch over a mapped file of {FILE_MB} MB in random order: {seconds:.1f} s; "
            f"memory grew by {max(peak, anonymous_mb()) - before:.1f} MB."
        )


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60_000, 28, 28), dtype=np.uint8)
    y = rng.integers(0, 10, 60_000)
    lengths = np.clip(rng.lognormal(4, 0.7, 100_000), 2, 512).astype(int)
    rows = [rng.integers(0, 32_000, n).tolist() for n in lengths]

    def images() -> Iterable:
        return DataLoader(MapBatches((x, y), scaled), BATCH_SIZE, shuffle=True, seed=0)

    def tokens() -> Iterable:
        return DataLoader(rows, BATCH_SIZE, shuffle=True, seed=0, collate_fn=padded)

    masked = [(row, [1] * len(row)) for row in rows]
    bucketed = BucketBatches(masked, BATCH_SIZE, seed=0)
    print("| a batch of | ours, ms | theirs, ms | theirs / ours |")
    print("|---|---|---|---|")
    for num in (0, 2):
        with_workers = f"torch with {num} workers"
        options = {"num_workers": num, "persistent_workers": num > 0}
        compare(
            f"60,000 images in memory, by MapBatches; {with_workers}",
            images,
            lambda options=options: torch_loader(Images(x, y), **options),
        )
        for name, ours, data, collate in (
            ("BucketBatches, torch makes the same four arrays", None, masked, text_tensors),
            ("BucketBatches, torch makes the tokens alone", None, rows, padded_tensor),
            ("the same collate_fn in both", tokens, rows, padded_tensor),
        ):
            compare(
                f"100,000 token lists, {name}; {with_workers}",
                ours or (lambda: bucketed),
                lambda options=options, data=data, collate=collate: torch_loader(
                    data, collate_fn=collate, **options
                ),
            )
        compare(
            f"slow rows, {num} workers in both",
            lambda num=num: DataLoader(
                SlowRows(), BATCH_SIZE, True, num_workers=num, persistent_workers=num > 0
            ),
            lambda num=num: torch_loader(SlowRows(), num_workers=num, persistent_workers=num > 0),
        )
    for num_threads in (0, 2):
        stream = mlx_data_images(x, y, num_threads)
        if stream is not None:
            name = f"60,000 images in memory, by MapBatches; mlx-data with {num_threads} threads"
            compare(name, images, lambda stream=stream: stream)
        stream = mlx_data_tokens(rows, num_threads)
        if stream is not None:
            kind = "100,000 token lists, BucketBatches, mlx-data makes the tokens alone"
            name = f"{kind}; {num_threads} threads"
            compare(name, lambda: bucketed, lambda stream=stream: stream)
    mapped_epoch()


if __name__ == "__main__":
    main()
