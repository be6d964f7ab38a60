"""How does fine-tuning compare with mlx-lm's own tuner, in one run?

A small Llama of random weights is tuned with LoRA on rows of lognormal length by mlx-lm's
``tuner.trainer.train`` and by ``Trainer.fit``, in turn, each in its own process: the same rows,
masks, rank, targets, optimizer and rate. Printed: target tokens a second by the clock and by the
processor time of all threads (counted from the masks; two epochs are left out, for compiling), peak
memory, padding, shapes and losses. Then the peak of full, LoRA, QLoRA and last-4 training with the
same batches.

ROUNDS, STEPS, ROWS, WIDTH, LAYERS, BATCH and SHAPES change the size. The clock is noisy where
others use the machine; processor time with OPENBLAS_NUM_THREADS=1 is not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from mlx_fit import Callback, CausalLM, Trainer, finetune  # first: it may have to load a BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
import mlx.optimizers as optim  # isort: skip
import numpy as np  # isort: skip
from mlx_lm.models.llama import Model, ModelArgs  # isort: skip

from mlx_fit.text import BucketBatches  # isort: skip

ROUNDS = int(os.environ.get("ROUNDS", "2"))
STEPS = int(os.environ.get("STEPS", "30"))
ROWS = int(os.environ.get("ROWS", "100"))
WIDTH = int(os.environ.get("WIDTH", "128"))
BATCH = int(os.environ.get("BATCH", "4"))
LAYERS = int(os.environ.get("LAYERS", "4"))
SHAPES = int(os.environ.get("SHAPES", "8"))
VOCABULARY, RATE = 8192, 1e-3
TARGETS = ["self_attn.q_proj", "self_attn.v_proj"]


def make_model() -> nn.Module:
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            intermediate_size=4 * WIDTH,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
        )
    )
    mx.eval(model.parameters())
    return model


def make_rows() -> list[tuple[list[int], int]]:
    """Tokens and the length of the prompt; a third of a row is prompt."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 0.8, ROWS), 8, 512).astype(int)
    # Each token follows from the one before, most of the time, so that there is something to learn.
    rows = []
    for length in lengths:
        start = rng.integers(0, 200)
        noise = rng.integers(0, 200, length) * (rng.random(length) < 0.1)
        rows.append((((start + np.arange(length) + noise) % 200 + 1).tolist(), int(length) // 3))
    return rows


class Watch:
    """Times, losses and shapes of steps, the first ones left out of the time."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.targets = self.positions = self.padding = 0

    def see(self, shape: tuple[int, ...], real: int, targets: int) -> None:
        self.shapes.add(shape)
        self.targets += targets
        self.positions += int(np.prod(shape))
        self.padding += int(np.prod(shape)) - real


def ours(warm: int, counted: int) -> dict[str, Any]:
    model, rows = make_model(), make_rows()
    finetune.apply_lora(model, rank=8, alpha=16, targets=TARGETS)
    items = [(t, [0] * p + [1] * (len(t) - p)) for t, p in rows]
    loader, watch, losses = BucketBatches(items, BATCH, SHAPES, seed=0), Watch(), []
    clock = SimpleNamespace(start=now())

    class Start(Callback):
        def on_train_batch_end(self, batch: int, logs: Any) -> None:
            losses.append(logs.batch["loss"])  # waits for the step, as mlx-lm does
            if len(losses) == warm:
                watch.__init__()  # type: ignore[misc]
                mx.reset_peak_memory()
                clock.start = now()

    def batches() -> Any:
        for batch in loader:
            watch.see(batch.tokens.shape, int((batch.segments > 0).sum()), int(batch.weights.sum()))
            yield batch

    trainer = Trainer(model, optim.AdamW(RATE), objective=CausalLM(), seed=0)
    trainer.fit(batches, max_steps=warm + counted, epochs=99, verbose=0, callbacks=Start())
    return report(watch, now() - clock.start, losses[warm:])


def theirs(warm: int, counted: int) -> dict[str, Any]:
    from mlx_lm.tuner import trainer as tuner
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, rows = make_model(), make_rows()
    model.freeze()
    parameters = {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": TARGETS}
    linear_to_lora_layers(model, LAYERS, parameters)
    watch, losses, clock = Watch(), [], SimpleNamespace(start=now(), end=now())

    class Rows:
        """What CacheDataset holds: tokens and prompt length, already there."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> tuple[list[int], int]:
            return rows[index]

    def batches(*args: Any, **kwargs: Any) -> Any:
        for number, (batch, lengths) in enumerate(tuner.iterate_batches(*args, **kwargs), 1):
            spans = np.array(lengths)
            if number == warm + 1:
                watch.__init__()  # type: ignore[misc]
                mx.reset_peak_memory()
                clock.start = now()
            shape = (batch.shape[0], batch.shape[1] - 1)
            # Its targets reach one behind a row's last token: that is not a real one.
            watch.see(
                shape, int(spans[:, 1].sum()), int((spans[:, 1] - np.maximum(spans[:, 0], 1)).sum())
            )
            yield batch, lengths

    class Losses:
        def on_train_loss_report(self, found: dict[str, Any]) -> None:
            clock.end = now()
            losses.append(found["train_loss"])

        def on_val_loss_report(self, found: dict[str, Any]) -> None:
            pass

    settings = tuner.TrainingArgs(
        batch_size=BATCH,
        iters=warm + counted,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=2048,
        adapter_file="/dev/null/none",
    )
    mx.save_safetensors, kept = (lambda *args, **kwargs: None), mx.save_safetensors
    try:
        tuner.train(
            model,
            optim.AdamW(RATE),
            Rows(),
            args=settings,
            iterate_batches=batches,
            training_callback=Losses(),
        )
    finally:
        mx.save_safetensors = kept
    return report(watch, clock.end - clock.start, losses[warm:])


def now() -> np.ndarray:
    """Seconds of the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def report(watch: Watch, seconds: np.ndarray, losses: list[float]) -> dict[str, Any]:
    marks = [float(np.mean(losses[i : i + 10])) for i in range(0, len(losses), 10)]
    return {
        "rate": watch.targets / seconds[0],
        "cpu_rate": watch.targets / seconds[1],
        "peak": mx.get_peak_memory(),
        "padding": watch.padding / watch.positions,
        "shapes": len(watch.shapes),
        "losses": marks,
    }


def peak(kind: str) -> dict[str, Any]:
    """Peak memory of steps on the same batches."""
    model = make_model()
    if kind == "qlora":
        nn.quantize(model, 64, 4)
    if kind == "full":
        finetune.select(model, patterns=["*"])
    elif kind == "last-4":
        finetune.select(model, last_layers=4)
    else:
        finetune.apply_lora(model, rank=8)
    items = [(t, [0] * p + [1] * (len(t) - p)) for t, p in make_rows()]
    trainer = Trainer(model, optim.AdamW(RATE), objective=CausalLM(chunk_size=128), seed=0)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.fit(BucketBatches(items, BATCH, 4, seed=0), max_steps=2, epochs=9, verbose=0)
    found = finetune.statistics(model, trainer.optimizer)
    return {
        "peak": mx.get_peak_memory(),
        "weights": found.trainable_bytes + found.frozen_bytes,
        "optimizer": found.optimizer_bytes_after,
        "share": found.ratio,
    }


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    print(f"{LAYERS} layers of {WIDTH}, vocabulary {VOCABULARY}, {ROWS} rows, batches of {BATCH}, "
          f"{STEPS} steps counted, {ROUNDS} rounds in turn")  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"mlx_fit": [], "mlx-lm": []}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            runs.append(run(name))
    print("          targets/s  /cpu_s   peak_mb  padding  shapes  mean losses of 10 steps")
    for name, runs in found.items():
        last = runs[-1]
        rate, cpu = (statistics.median(r[key] for r in runs) for key in ("rate", "cpu_rate"))
        losses = " ".join(f"{loss:.2f}" for loss in last["losses"])
        print(f"{name:>8} {rate:>10.0f} {cpu:>7.0f} {last['peak'] / 1e6:>9.1f} "
              f"{last['padding']:>8.1%} {last['shapes']:>7}  {losses}")  # fmt: skip
    pairs = list(zip(found["mlx_fit"], found["mlx-lm"], strict=True))
    for key, what in (("rate", "second"), ("cpu_rate", "second of the processor")):
        ratios = [a[key] / b[key] for a, b in pairs]
        print(f"targets a {what}, mlx_fit / mlx-lm: {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f}-{max(ratios):.2f})")  # fmt: skip
    print(f"peak, mlx_fit / mlx-lm: {pairs[-1][0]['peak'] / pairs[-1][1]['peak']:.2f}")
    print("    kind   peak_mb  weights_mb  optimizer_mb  trains")
    for kind in ("full", "last-4", "lora", "qlora"):
        row = run(kind)
        print(f"{kind:>8} {row['peak'] / 1e6:>9.1f} {row['weights'] / 1e6:>11.1f} "
              f"{row['optimizer'] / 1e6:>13.2f} {row['share']:>7.2%}")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] in ("mlx_fit", "mlx-lm"):
        measure = ours if sys.argv[1] == "mlx_fit" else theirs
        print(json.dumps(measure(2 * (ROWS // BATCH), STEPS)))
    else:
        print(json.dumps(peak(sys.argv[1])))
