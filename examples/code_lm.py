"""A model of Python in tokens: tokenizer, packed documents and a transformer, from nothing.

    python examples/code_lm.py [steps] [folder]

A byte-pair tokenizer is trained on the standard library's sources (``pip install tokenizers``),
the functions and classes of each module become documents, short ones share a row, and
:class:`~mlx_fit.CausalLM` counts real targets only. The yardstick is a 5-gram model of the same
tokens. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

import mlx.optimizers as optim
import numpy as np
from ngram import perplexity
from small_gpt import GPT, Samples
from tokenizers import ByteLevelBPETokenizer

from mlx_fit import CausalLM, TensorBoard, Trainer
from mlx_fit.schedules import warmup_cosine
from mlx_fit.text import PackedBatches, TextDataset

WINDOW, BATCH, VOCABULARY = 128, 16, 1024
END = "<|end|>"


def split(every: int = 40) -> tuple[list[dict], list[dict]]:
    """Top-level functions and classes as rows; every fortieth module is for validation."""
    parts: tuple[list[dict], list[dict]] = [], []
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                parts[number % every == 0].append({"text": text + END})
    return parts


def main(num_steps: int, folder: Path, num_rows: int | None = None) -> dict[str, float]:
    """Train, and return the validation perplexities of both models, per token."""
    rows, held_out = (part[:num_rows] for part in split())
    tokenizer = ByteLevelBPETokenizer()
    texts = [row["text"] for row in rows]
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    train, val = (TextDataset(part, tokenizer) for part in (rows, held_out))
    print(train.report())
    five_gram = perplexity(*(flat(data) for data in (train, val)), VOCABULARY, order=5)
    print(f"perplexity of a 5-gram model: {five_gram:.2f}")

    model = GPT(VOCABULARY)
    rate = warmup_cosine(2e-3, num_steps, warmup_steps=max(1, num_steps // 15))
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=0.1)
    trainer = Trainer(model, optimizer, objective=CausalLM(), clip_norm=1.0, seed=0)
    board = TensorBoard(folder)
    prompt = np.array(tokenizer.encode("def read_lines(path):\n").ids)
    batches = [PackedBatches(d, BATCH, WINDOW, seed=0, overlong="split") for d in (train, val)]
    history = trainer.fit(
        *batches,
        epochs=100,
        max_steps=num_steps,
        validation_freq=f"{max(1, num_steps // 4)} steps",
        callbacks=[board, Samples(board, prompt, lambda ids: tokenizer.decode([*ids]), WINDOW)],
    )
    found = {"5-gram": five_gram, "transformer": history.evaluations[-1]["val_perplexity"]}
    print(f"\nvalidation perplexity per token: {found}\ncurves: tensorboard --logdir {folder}")
    return found


def flat(data: TextDataset) -> np.ndarray:
    """All documents, one after the other."""
    return np.concatenate([np.asarray(tokens) for tokens, _ in data])


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 1500, Path(*arguments[1:2] or ["runs/code_lm"]))
