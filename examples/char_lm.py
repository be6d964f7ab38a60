"""A character model of Python: a small transformer learns the standard library's sources.

    python examples/char_lm.py [steps] [folder]

Nothing is downloaded: the text is what came with your Python. The yardstick is a 5-gram model on
the same split, computed here. Samples are printed and written to TensorBoard beside the curves.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import mlx.optimizers as optim
import numpy as np
from ngram import perplexity
from small_gpt import GPT, Samples

from mlx_fit import TensorBoard, Trainer
from mlx_fit.schedules import warmup_cosine

WINDOW, BATCH = 128, 16


def split(every: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the standard library's modules; every fortieth is for validation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = {*paths[::every]}
    train = b"".join(path.read_bytes() for path in paths if path not in held_out)
    val = b"".join(path.read_bytes() for path in paths if path in held_out)
    return np.frombuffer(train, np.uint8), np.frombuffer(val, np.uint8)


def windows(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, the next bytes, each of shape ``(rows, WINDOW)``."""
    num_rows = (len(text) - 1) // WINDOW
    x = text[: num_rows * WINDOW].reshape(num_rows, WINDOW)
    y = text[1 : num_rows * WINDOW + 1].reshape(num_rows, WINDOW)
    return x, y


def decode(tokens: np.ndarray) -> str:
    return bytes(tokens.astype(np.uint8)).decode("latin-1")


def main(num_steps: int, folder: Path, num_bytes: int | None = None) -> dict[str, float]:
    """Train, and return the validation perplexities of both models, per byte."""
    text, held_out = (part[:num_bytes] for part in split())
    five_gram = perplexity(text, held_out, vocabulary=256, order=5)
    print(f"{len(text):,} bytes to learn from; perplexity of a 5-gram model: {five_gram:.3f}")

    model = GPT(vocabulary=256)
    rate = warmup_cosine(2e-3, num_steps, warmup_steps=max(1, num_steps // 15))
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=0.1)
    metrics = ["perplexity"]
    trainer = Trainer(
        model, optimizer, "cross_entropy", metrics, batch_size=BATCH, clip_norm=1.0, seed=0
    )
    board = TensorBoard(folder)
    prompt = np.frombuffer(b"def read_lines(path):\n", np.uint8)
    history = trainer.fit(
        windows(text),
        windows(held_out),
        epochs=100,
        max_steps=num_steps,
        validation_freq=f"{max(1, num_steps // 4)} steps",
        callbacks=[board, Samples(board, prompt, decode, WINDOW)],
    )
    found = {"5-gram": five_gram, "transformer": history.evaluations[-1]["val_perplexity"]}
    print(f"\nvalidation perplexity per byte: {found}\ncurves: tensorboard --logdir {folder}")
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 1500, Path(*arguments[1:2] or ["runs/char_lm"]))
