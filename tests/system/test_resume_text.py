"""A language model's run on batches by length, or packed, goes on bit for bit."""

from __future__ import annotations

import mlx.optimizers as optim
import numpy as np
import pytest
from llama import make_llama
from mlx.utils import tree_flatten

from mlx_fit import Callback, CausalLM, Trainer
from mlx_fit.text import BucketBatches, PackedBatches

LOADERS = {
    "bucketed": lambda rows: BucketBatches(rows, 4, max_shapes=6, seed=2),
    "packed": lambda rows: PackedBatches(rows, 2, 24, seed=2),
}


class Crash(RuntimeError):
    pass


class CrashAfter(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, batch, logs):
        self.after -= 1
        if self.after == 0:
            raise Crash


def run(kind, rows, *callbacks, **options):
    """Weights and losses of a fit in which everything is new."""
    model = make_llama(num_hidden_layers=1)
    trainer = Trainer(model, optim.AdamW(0.01), objective=CausalLM(), seed=0)
    loader = LOADERS[kind](rows)
    history = trainer.fit(loader, epochs=3, verbose=0, callbacks=callbacks, **options)
    weights = {k: np.array(v).tobytes() for k, v in tree_flatten(model.parameters())}
    return weights, history.history


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("after", [1, 4, 7])
def test_token_batches_go_on_where_they_were(tmp_path, kind, after, rng):
    documents = [rng.integers(1, 100, n).astype(np.int32) for n in rng.integers(3, 20, 30)]
    rows = [(tokens, np.ones(len(tokens), np.uint8)) for tokens in documents]
    whole = run(kind, rows)
    with pytest.raises(Crash):
        run(kind, rows, CrashAfter(after), checkpoint_dir=tmp_path)
    assert run(kind, rows, checkpoint_dir=tmp_path, resume=True) == whole
