"""How fast is JSONL indexed, and what do batches by length and packing waste?

Indexing is compared with reading the file's lines in Python. Padding and waste are counts, the same
on every machine: 30,000 documents of lognormal lengths (mean of the logarithm 5, deviation 1, at
most 2,048 tokens), and 600 of them, in batches of 32.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_fit.text import BucketBatches, JsonLines, PackedBatches

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SIZE_MB = int(os.environ.get("SIZE_MB", "500"))
BATCH_SIZE = 32


class Documents:
    """Documents that are nothing but their lengths."""

    def __init__(self, count: int, longest: int = 2048) -> None:
        rng = np.random.default_rng(0)
        self.lengths = np.clip(rng.lognormal(5, 1, count), 2, longest).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(self.lengths[index], np.int32), np.ones(self.lengths[index], np.uint8)

    def row_name(self, index: int) -> str:
        return f"document {index}"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_rows(path: Path) -> int:
    """A file of ``SIZE_MB``; returns its number of rows."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "x" * int(n)}).encode() + b"\n" for n in rng.lognormal(6, 1, 4000)]
    block = b"".join(lines)
    repeats = max(SIZE_MB * 1_000_000 // len(block), 1)
    with path.open("wb") as file:
        for _ in range(repeats):
            file.write(block)
    return repeats * len(lines)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def indexing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write_rows(path)
        megabytes = path.stat().st_size / 1e6
        count_lines(path)  # both read a file that is in memory
        ours, by_hand = [], []
        for _ in range(ROUNDS):
            by_hand.append(seconds(lambda: count_lines(path)))
            ours.append(seconds(lambda: JsonLines(path)))
        reader = JsonLines(path)
        order = np.random.default_rng(0).integers(0, rows, 20_000).tolist()
        read = seconds(lambda: [reader[i] for i in order])
    print(f"JSONL of {megabytes:.0f} MB, {rows:,} rows, {ROUNDS} rounds in turn, median (min-max)")
    for name, times in (("indexing", ours), ("for line in file", by_hand)):
        rates = sorted(megabytes / t for t in times)
        print(f"{name:<18} {statistics.median(rates):7.0f} MB/s ({rates[0]:.0f}-{rates[-1]:.0f})")
    print(f"{'rows in any order':<18} {len(order) / read:7.0f} rows/s\n")


def padding() -> None:
    print(f"padding, batches of {BATCH_SIZE}, one epoch")
    print("documents  order      padding  shapes  planned, s")
    for count in (30_000, 600):
        documents = Documents(count)
        rng = np.random.default_rng(1)
        groups = np.array_split(rng.permutation(count), -(-count // BATCH_SIZE))
        longest = [int(documents.lengths[group].max()) for group in groups]
        positions = sum(len(g) * w for g, w in zip(groups, longest, strict=True))
        shapes = {(len(g), w) for g, w in zip(groups, longest, strict=True)}
        print(f"{count:>9,}  random     {waste(documents, positions):7.1%}  {len(shapes):6}")
        for most in (32, 8):
            start = time.perf_counter()
            loader = BucketBatches(documents, BATCH_SIZE, most, seed=0)
            iter(loader).__next__()
            planned = time.perf_counter() - start
            found = [batch.tokens.shape for batch in loader]
            positions = sum(rows * width for rows, width in found)
            print(
                f"{count:>9,}  by length  {waste(documents, positions):7.1%}  {len(set(found)):6}"
                f"  {planned:10.2f}"
            )
    print()


def packing() -> None:
    print("packing, one epoch")
    print("documents  row length   rows   waste  planned, s")
    for count, row_length in ((30_000, 2048), (30_000, 8192), (600, 2048)):
        documents = Documents(count)
        start = time.perf_counter()
        loader = PackedBatches(documents, 8, row_length, seed=0)
        iter(loader).__next__()
        planned = time.perf_counter() - start
        rows = sum(len(batch.tokens) for batch in loader)
        share = waste(documents, rows * row_length)
        print(f"{count:>9,}  {row_length:>10,}  {rows:>5,}  {share:6.2%}  {planned:10.2f}")


def waste(documents: Documents, positions: int) -> float:
    return 1 - float(documents.lengths.sum()) / positions


def main() -> None:
    indexing()
    padding()
    packing()


if __name__ == "__main__":
    main()
