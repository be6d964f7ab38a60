"""A tour of the callbacks: everything that can watch or steer a fit, on handwritten digits.

    python examples/callbacks_tour.py [folder]

Afterwards look at the curves with ``tensorboard --logdir <folder>`` and at the trace in
https://ui.perfetto.dev.
"""

import sys
from pathlib import Path

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit import (
    EMA,
    CSVLogger,
    DeviceMonitor,
    EarlyStopping,
    FreezeUntil,
    GradientMonitor,
    JSONLogger,
    ModelCheckpoint,
    Predictions,
    Profiler,
    ReduceLROnPlateau,
    TensorBoard,
    Timer,
    Trainer,
    datasets,
    find_learning_rate,
)
from mlx_fit.metrics import ConfusionMatrix


def main(folder: Path, epochs: int = 12) -> dict[str, float]:
    """Train, write everything into ``folder``, and return the metrics of the test rows."""
    images, labels = datasets.digits()  # (1797, 8, 8) and (1797,), NumPy
    x, y = images.reshape(-1, 64), labels
    train, val, test = (x[:1200], y[:1200]), (x[1200:1500], y[1200:1500]), (x[1500:], y[1500:])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = optim.AdamW(learning_rate=1e-3)
    metrics = ["accuracy", ConfusionMatrix()]
    trainer = Trainer(model, optimizer, "cross_entropy", metrics, clip_norm=1.0, seed=0)

    # A range test first. It leaves weights, optimizer and random key as they were.
    finder = find_learning_rate(trainer, train, min_rate=1e-5, max_rate=1.0, num_steps=60)
    optimizer.learning_rate = finder.suggestion or 1e-3
    print(f"suggested learning rate: {finder.suggestion:.2e}")

    ema = EMA(decay=0.98)  # what is validated, saved and restored
    trainer.fit(
        train,
        val,
        epochs=epochs,
        callbacks=[
            Profiler(trace=folder / "trace.json"),  # first, so that it sees all others
            ema,
            FreezeUntil(1, "layers.0"),  # the first epoch trains the head alone
            ReduceLROnPlateau(factor=0.5, patience=2),
            EarlyStopping(patience=5, restore_best_weights=True),
            Timer("10 minutes"),
            ModelCheckpoint(folder / "best.safetensors", save_best_only=True),
            GradientMonitor(),
            DeviceMonitor(),  # before the loggers that write its values
            CSVLogger(folder / "log.csv"),
            JSONLogger(folder / "log.jsonl"),
            TensorBoard(folder, histogram_freq=1, hparams={"width": 64}),
            Predictions((val[0][:8], val[1][:8]), folder),
        ],
        verbose=2,
    )
    # EarlyStopping has put the best averaged weights into the model.
    return trainer.evaluate(test, verbose=0)


if __name__ == "__main__":
    found = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tour"))
    print(f"test accuracy: {found['accuracy']:.3f}")
