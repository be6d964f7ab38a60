"""What each rank of ``soak_ranks.py`` does: a short fit that fails as it is told to.

python soak_rank.py FOLDER FAULT RANK STEP, started by ``mlx-fit launch``. At the end every rank
writes the loss and a digest of its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_fit import Callback, DistributedTrainer, SyncPolicy
from mlx_fit.distributed.environment import ring_addresses
from mlx_fit.distributed.ring_sockets import RingSockets

TIMEOUT = 2.0


class Fault(Callback):
    """Does its harm once, after a step, on one rank; not again after a restart."""

    def __init__(self, fault: str, rank: int, step: int, folder: Path) -> None:
        self.fault = fault
        self.rank = rank
        self.step = step
        self.done = folder / "fault"

    def on_train_batch_end(self, batch: int, logs: object) -> None:
        trainer = self.trainer
        if trainer.rank != self.rank or trainer.step != self.step or self.done.exists():
            return
        if self.fault == "none":
            return
        self.done.touch()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.fault == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.fault == "raise":
            raise ValueError("the fault of the soak")
        elif self.fault == "memory":
            raise RuntimeError("[malloc] Unable to allocate 9000 bytes.")
        elif self.fault == "nan":
            trainer.model.layers[0].weight = trainer.model.layers[0].weight * mx.nan
        elif self.fault == "slow":
            time.sleep(1.5 * TIMEOUT)
        elif self.fault == "cut":
            RingSockets(ring_addresses(os.environ), self.rank).cut()
        elif self.fault == "full":  # from now on no file grows beyond this
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))


def main() -> None:
    folder, fault = Path(sys.argv[1]), sys.argv[2]
    mx.random.seed(0)
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(103, 8)).astype(np.float32), rng.integers(0, 4, 103)
    trainer = DistributedTrainer(
        nn.Sequential(*layers),
        optim.AdamW(1e-2),
        "cross_entropy",
        batch_size=12,
        seed=0,
        sync=SyncPolicy(timeout=TIMEOUT, init_timeout=30),
    )
    history = trainer.fit(
        data,
        data,
        epochs=3,
        callbacks=Fault(fault, int(sys.argv[3]), int(sys.argv[4]), folder),
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every="4 steps",
        resume="auto",
        verbose=0,
    )
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(trainer.model.parameters())):
        digest.update(name.encode() + np.array(array).tobytes())
    found = {"loss": history.history["loss"], "weights": digest.hexdigest()}
    (folder / f"rank{trainer.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
