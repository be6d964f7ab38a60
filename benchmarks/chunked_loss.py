"""What does ``CausalLM(chunk_size=...)`` save, and what does it cost?

A two-layer Llama with a vocabulary of 32,000 takes AdamW steps of 2,048 tokens: all parameters, and
LoRA with a frozen base. Peak memory and seconds of a compiled step (the fastest), each variant in a
process of its own, as ratios to the whole logits; the first row is the body alone, which no loss
can go below. Also printed: the loss and how far the gradients are from those of the whole logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from mlx_fit import CausalLM, finetune  # first: it may have to load a BLAS before mlx.core

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
from mlx.utils import tree_flatten  # isort: skip
from mlx_lm.models.llama import Model, ModelArgs  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "5"))
VOCABULARY, ROWS, LENGTH = 32_000, 4, 512
CHUNKS = (64, 128, 256, 512)


def make_model(lora: bool) -> nn.Module:
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=256,
            num_hidden_layers=2,
            intermediate_size=1024,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
        )
    )
    if lora:
        finetune.apply_lora(model)
    mx.eval(model.parameters())
    return model


def make_batch() -> tuple[mx.array, mx.array, mx.array]:
    tokens = mx.random.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    weights = (mx.random.uniform(shape=(ROWS, LENGTH)) < 0.9).astype(mx.float32)
    batch = tokens[:, :-1], tokens[:, 1:], weights
    mx.eval(batch)
    return batch


def measure(kind: str, chunk_size: int | None) -> dict[str, float]:
    """Peak bytes and seconds of a compiled step, its loss, and the error of its gradients."""
    model, batch = make_model(kind == "lora"), make_batch()
    objective = CausalLM(chunk_size=chunk_size or None)

    def loss_function(model: nn.Module) -> mx.array:
        if chunk_size == 0:
            return model.model(batch[0]).sum()
        return objective(model, batch).mean

    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state: list[Any] = [model.state, optimizer.state]

    def step() -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_function)(model)
        optimizer.update(model, gradients)
        return loss

    error = gradient_error(model, batch, chunk_size) if chunk_size else 0.0
    compiled = mx.compile(step, inputs=state, outputs=state)
    first = compiled()
    mx.eval(state, first)
    mx.reset_peak_memory()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        mx.eval(compiled(), state)
        seconds.append(time.perf_counter() - start)
    return {
        "peak": mx.get_peak_memory(),
        "seconds": min(seconds),  # others may use the machine
        "loss": first.item(),
        "error": error,
    }


def gradient_error(model: nn.Module, batch: Any, chunk_size: int) -> float:
    """The largest difference of a gradient from that of the whole logits."""
    found = []
    for size in (chunk_size, None):
        objective = CausalLM(chunk_size=size)
        gradients = nn.value_and_grad(model, lambda m, o=objective: o(m, batch).mean)(model)[1]
        mx.eval(gradients)
        found.append(tree_flatten(gradients))
    return max(mx.abs(a - b).max().item() for (_, a), (_, b) in zip(*found, strict=True))


def run(kind: str, chunk_size: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, kind, json.dumps(chunk_size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    print(f"vocabulary {VOCABULARY}, {ROWS} x {LENGTH} tokens, {ROUNDS} rounds, one process each")
    print("    kind   chunk  peak_mb   ratio  step_s   ratio      loss  gradient_error")
    for kind in ("full", "lora"):
        whole = run(kind, None)
        for chunk_size in (0, None, *CHUNKS):
            row = whole if chunk_size is None else run(kind, chunk_size)
            name = {0: "body", None: "whole"}.get(chunk_size, str(chunk_size))
            loss = f"{row['loss']:>9.5f} {row['error']:>15.1e}" if chunk_size != 0 else ""
            print(
                f"{kind:>8} {name:>7} {row['peak'] / 1e6:>8.0f} {row['peak'] / whole['peak']:>7.3f}"
                f" {row['seconds']:>7.2f} {row['seconds'] / whole['seconds']:>7.3f} {loss}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        main()
