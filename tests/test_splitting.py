"""Batches that do not fit: computed as smaller ones, with the bits of a run begun with them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import Do, trainer_of

import mlx_fit
from mlx_fit import CausalLM, Trainer
from mlx_fit.batch import TextBatch
from mlx_fit.errors import ConfigurationError, DataError, OutOfMemoryError
from mlx_fit.evaluation import EvaluationStep
from mlx_fit.splitting import Splitter

FULL = (
    "[metal::malloc] Attempting to allocate 9000 bytes which is greater than the maximum allowed "
    "buffer size of 4000 bytes."
)


class Net(nn.Module):
    """Dropout and BatchNorm, and a device that has room for ``room`` rows only."""

    def __init__(self, room=None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm(16), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.4)
        self.room = room

    def __call__(self, x):
        hidden = self.dropout(nn.relu(self.first(x)))
        if self.training and self.room is not None and x.shape[0] > self.room:
            raise RuntimeError(FULL)
        return self.last(self.norm(hidden))


def data(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 4)).astype(np.float32), rng.integers(0, 3, rows).astype(np.int32)


def make(room=None, **options):
    mx.random.seed(1)
    model = Net(room)
    mx.eval(model.parameters())
    options = {"batch_size": 8, "seed": 3} | options
    return Trainer(model, optim.AdamW(0.01), "cross_entropy", ["accuracy"], **options)


def everything(trainer):
    arrays = dict(tree_flatten(trainer.model.parameters()))
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(trainer.optimizer.state)}
    arrays["key"] = mx.random.state[0]
    return {name: np.array(value) for name, value in arrays.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def fitted(trainer, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.fit(*args, verbose=0, **options)
    return everything(trainer), history


@pytest.mark.parametrize(("room", "size"), [(4, 4), (3, 2), (7, 4)])
@pytest.mark.parametrize("options", [{}, {"compile": False}, {"clip_norm": 0.1}], ids=str)
def test_a_split_run_has_the_bits_of_one_that_began_with_small_batches(room, size, options):
    split = make(room, on_oom="split", **options)
    small = make(batch_size=size, gradient_accumulation=8 // size, **options)
    bits, history = fitted(split, data(), epochs=2)
    expected, small_history = fitted(small, data(), epochs=2)
    assert split.micro_batch_size == size
    assert_same(bits, expected)
    assert history.history == small_history.history


def test_no_part_is_left_with_one_row_that_batchnorm_refuses():
    trainer = make(room=3, batch_size=10, on_oom="split")
    with pytest.warns(UserWarning, match="micro-batches of 3 rows"):
        trainer.fit(data(20), verbose=0)
    assert trainer.step == 2
    splitter = Splitter()
    for rows, total, sizes in ((3, 10, [3, 3, 2, 2]), (3, 9, [3, 3, 3]), (4, 5, [3, 2])):
        splitter.rows = rows
        parts = splitter.parts(np.arange(total))
        assert [len(part) for part in parts] == sizes
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(total))


def test_room_for_one_row_alone_says_what_to_use_instead_of_batchnorm():
    trainer = make(room=1, on_oom="split")
    with pytest.raises(DataError, match=r"or a part of it has one row.*GroupNorm"):
        trainer.fit(data(8), verbose=0)


def test_windows_of_several_batches_are_split_as_well():
    split = make(5, on_oom="split", gradient_accumulation=2)
    small = make(batch_size=4, gradient_accumulation=4)
    assert_same(fitted(split, data(), epochs=2)[0], fitted(small, data(), epochs=2)[0])


def test_memory_that_runs_out_in_the_middle_of_a_run_costs_no_update():
    """Three whole batches; from the fourth on there is room for half."""
    x, y = data(32)
    whole, split = make(on_oom="split", seed=None), make(on_oom="split", seed=None)
    small = make(gradient_accumulation=2, seed=None)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    halves = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]
    mx.random.seed(5)
    fitted(whole, batches[:3])
    small.load_state_dict(whole.state_dict())
    expected, _ = fitted(small, halves[6:])

    def fill_up(trainer):
        trainer.model.room = 4
        trainer._train_step._batch.seen.clear()  # a device that fills up asks for no new shape
        trainer._train_step._rebuild()

    mx.random.seed(5)
    bits, _ = fitted(split, batches, callbacks=Do("on_train_batch_end", fill_up, 2))
    assert_same(bits, expected)


@pytest.mark.parametrize("rows", [8, 6])
@pytest.mark.parametrize("compile", [True, False])
def test_while_everything_fits_the_bits_are_those_of_a_plain_run(compile, rows):
    options = {"batch_size": rows, "compile": compile}
    split, plain = make(on_oom="split", **options), make(**options)
    assert_same(fitted(split, data(), epochs=2)[0], fitted(plain, data(), epochs=2)[0])
    assert split.micro_batch_size == rows


def failing_at_evaluation(monkeypatch, trainer, room, asynchronous):
    """Gradients of more than ``room`` rows fail when they are evaluated."""
    step_class = type(trainer._new_train_step())
    take, wait = step_class.__call__, step_class.wait_for_gradients
    rows = []

    def noted(self, batch):
        rows.append(len(batch[0]))
        self._is_async = asynchronous
        return take(self, batch)

    def failing(self):
        if rows[-1] > room:
            raise RuntimeError("[malloc] Unable to allocate 9000 bytes.")
        wait(self)

    monkeypatch.setattr(step_class, "__call__", noted)
    monkeypatch.setattr(step_class, "wait_for_gradients", failing)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_at_evaluation_is_redone_with_the_same_bits(monkeypatch, asynchronous):
    small = make(batch_size=2, gradient_accumulation=4)
    expected, small_history = fitted(small, data(), epochs=2)
    split = make(on_oom="split")
    failing_at_evaluation(monkeypatch, split, 3, asynchronous)
    bits, history = fitted(split, data(), epochs=2)
    assert_same(bits, expected)
    assert history.history == small_history.history
    assert split.micro_batch_size == 2


def test_it_is_said_once_and_kept_for_later_fits():
    trainer = make(2, on_oom="split")
    with pytest.warns(UserWarning, match="micro-batches of 2 rows") as caught:
        trainer.fit(data(), epochs=2, verbose=0)
    assert len(caught) == 1
    trainer.fit(data(), verbose=0)  # nothing more to say
    assert trainer.micro_batch_size == 2


def test_one_row_that_does_not_fit_raises_and_leaves_everything():
    trainer = make(0, on_oom="split", seed=None)
    trainer.optimizer.init(trainer.model.trainable_parameters())
    before = everything(trainer)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.fit(data(), verbose=0)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.batch_size == 1
    assert "One row alone does not fit" in str(caught.value)
    assert_same(everything(trainer), before)


def test_too_many_buffers_are_not_helped_by_fewer_rows():
    text = "[metal::malloc] Resource limit (499000) exceeded."

    def loss(outputs, targets):
        raise RuntimeError(text)

    with pytest.raises(OutOfMemoryError, match="fewer batch shapes") as caught:
        trainer_of(loss=loss, on_oom="split").fit(
            (np.ones((8, 4), np.float32), np.zeros((8, 3), np.float32)), verbose=0
        )
    assert caught.value.kind == "buffers"


def test_a_bug_in_a_later_part_leaves_no_trace_of_the_earlier_ones():
    x, y = data(8)
    y[7] = 99
    trainer = make(2, on_oom="split", seed=None)
    fitted(trainer, data())
    before = everything(trainer)
    with pytest.raises(DataError):
        trainer.train_on_batch(x, y)
    assert_same(everything(trainer), before)


def test_train_on_batch_splits_too():
    x, y = data(8)
    split, small = make(4, on_oom="split", seed=None), make(seed=None, gradient_accumulation=2)
    mx.random.seed(2)
    with pytest.warns(UserWarning, match="4 rows"):
        logs = split.train_on_batch(x, y)
    mx.random.seed(2)
    bits = everything(split)
    expected, history = fitted(small, [(x[:4], y[:4]), (x[4:], y[4:])])
    bits["key"] = expected["key"]
    assert_same(bits, expected)
    assert logs["loss"] == history.history["loss"][0]


def test_a_batchs_own_values_are_those_of_all_its_parts():
    seen = []
    trainer = make(2, on_oom="split")
    watch = Do("on_train_batch_end", lambda run: None)
    watch.on_train_batch_end = lambda batch, logs: seen.append((logs.batch["loss"], logs["loss"]))
    fitted(trainer, data(8), callbacks=watch)
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-6)


def test_rows_that_weigh_nothing_are_split_as_well():
    x, y = data(8)
    weights = np.array([0, 0, 0, 0, 1, 2, 1, 1], np.float32)
    split = make(4, on_oom="split")
    small = make(batch_size=4, gradient_accumulation=2)
    batches = [(x, y, weights), (x, y, 0 * weights), (x, y, weights)]
    halves = [(a[i : i + 4], b[i : i + 4], w[i : i + 4]) for a, b, w in batches for i in (0, 4)]
    one, other = fitted(split, batches), fitted(small, halves)
    assert_same(one[0], other[0])
    assert one[1].history == other[1].history


def test_a_batch_of_tokens_is_split_by_its_rows():
    mx.random.seed(0)

    def run(room, batches, **options):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

            def __call__(self, tokens):
                if tokens.shape[0] > room:
                    raise RuntimeError(FULL)
                return self.head(self.embedding(tokens))

        mx.random.seed(4)
        model = Model()
        mx.eval(model.parameters())
        trainer = Trainer(model, optim.Adam(0.1), objective=CausalLM(), **options)
        fitted(trainer, batches)
        return everything(trainer)

    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (8, 5)).astype(np.int32)
    weights = (rng.random((8, 5)) > 0.3).astype(np.float32)
    batch = TextBatch(tokens, np.roll(tokens, -1, 1), weights, np.ones((8, 5), np.int32))
    halves = [TextBatch(*[part[i : i + 4] for part in batch]) for i in (0, 4)]
    split = run(5, [batch], on_oom="split")
    small = run(8, halves, gradient_accumulation=2)
    assert_same(split, small)


def test_what_cannot_be_cut_says_so():
    def objective(model, batch):
        if batch["x"].shape[0] > 2:
            raise RuntimeError(FULL)
        return model(batch["x"]).square().mean()

    trainer = Trainer(nn.Linear(4, 1), optim.SGD(0.1), objective=objective, on_oom="split")
    batch = {"x": np.ones((4, 4), np.float32), "temperature": np.float32(1.0)}
    with pytest.raises(DataError, match="without an axis of rows"):
        trainer.fit([batch], verbose=0)


def test_another_word_is_refused():
    with pytest.raises(ConfigurationError, match=r"on_oom='ignore'; expected 'raise' or 'split'"):
        trainer_of(on_oom="ignore")


RESUME = """
import sys, json, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {paths!r}
from test_splitting import data, everything, make
import numpy as np
trainer = make(None, on_oom="split")  # this process has room, and goes on as the run began
trainer.fit(data(), epochs=3, checkpoint_dir=sys.argv[1], resume=True, verbose=0)
np.savez(sys.argv[2], **everything(trainer))
print(trainer.micro_batch_size)
"""


def test_a_resumed_run_goes_on_with_the_same_size_and_bits(tmp_path):
    whole, _ = fitted(make(3, on_oom="split"), data(), epochs=3)
    first = make(3, on_oom="split")
    fitted(first, data(), epochs=3, max_steps=7, checkpoint_dir=tmp_path / "run")
    here = Path(__file__).parent
    code = RESUME.format(paths=[str(here), str(here.parent)])
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "end.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    with np.load(tmp_path / "end.npz") as found:
        assert_same(dict(found), whole)


def test_the_size_is_in_the_state_and_comes_back(tmp_path):
    trainer = make(2, on_oom="split")
    fitted(trainer, data())
    trainer.save(tmp_path / "all")
    assert json.loads((tmp_path / "all" / "state.json").read_text())["micro_batch_size"] == 2
    other = make(on_oom="split")
    other.load(tmp_path / "all")
    assert other.micro_batch_size == 2
    third = make(on_oom="split")
    third.load_state_dict(trainer.state_dict())
    assert third.micro_batch_size == 2


class Evaluated(Net):
    """A device with little room in evaluation alone; training has plenty."""

    def __call__(self, x):
        if not self.training and self.room is not None and x.shape[0] > self.room:
            raise RuntimeError(FULL)
        return self.last(self.norm(nn.relu(self.first(x))))


def test_evaluation_is_split_by_a_size_of_its_own():
    def run(room):
        trainer = make(on_oom="split")
        trainer.model = Evaluated(room)
        trainer.model.load_weights(tree_flatten(make().model.parameters()))
        return trainer

    split, whole = run(2), run(None)
    with pytest.warns(UserWarning, match="evaluation goes on with micro-batches of 2") as caught:
        found = split.evaluate(data(13), verbose=0)
    assert len(caught) == 1
    assert split.micro_batch_size == 8
    expected = whole.evaluate(data(13), verbose=0)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == split.evaluate(data(13), verbose=0)  # silently, from now on


def test_what_fails_when_an_evaluation_is_computed_counts_once(monkeypatch):
    trainer, whole = make(on_oom="split"), make()
    expected = whole.evaluate(data(13), verbose=0)
    take, evaluate, rows = EvaluationStep.__call__, mx.eval, []

    def noted(self, batch):
        rows.append(len(batch[0]))
        return take(self, batch)

    def failing(*trees):
        if rows and rows.pop() > 3:
            raise RuntimeError(FULL)
        evaluate(*trees)

    monkeypatch.setattr(EvaluationStep, "__call__", noted)
    monkeypatch.setattr(mx, "eval", failing)
    with pytest.warns(UserWarning, match="micro-batches of 2"):
        found = trainer.evaluate(data(13), verbose=0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_validation_that_is_split_does_not_split_training():
    trainer, plain = make(on_oom="split"), make()
    trainer.model, plain.model = Evaluated(2), Evaluated(None)
    for one in (trainer, plain):
        one.model.load_weights(tree_flatten(make().model.parameters()))
    bits, history = fitted(trainer, data(), data(16, seed=1), epochs=2)
    expected, plain_history = fitted(plain, data(), data(16, seed=1), epochs=2)
    assert_same(bits, expected)
    assert history.history["val_loss"] == pytest.approx(plain_history.history["val_loss"], rel=1e-6)


def test_metrics_of_every_row_see_each_row_once():
    x = np.linspace(0, 1, 40, dtype=np.float32).reshape(10, 4)
    y = np.arange(10) % 2
    values = []
    for room in (3, None):
        mx.random.seed(1)
        model = Evaluated(room)
        model.last = nn.Linear(16, 1)
        loss = "binary_cross_entropy"
        trainer = Trainer(model, optim.SGD(0.0), loss, ["auroc"], on_oom="split", batch_size=5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values.append(trainer.evaluate((x, y[:, None].astype(np.float32)), verbose=0)["auroc"])
    assert values[0] == values[1]


@pytest.mark.parametrize("compile", [True, False])
def test_a_batch_that_fits_is_traced_once(compile):
    trainer = make(on_oom="split", compile=compile)
    fitted(trainer, data())
    assert trainer._train_step.num_traces == (1 if compile else 5)


def test_an_objective_whose_batches_have_no_rows_trains_while_it_fits():
    def objective(model, batch):
        return mlx_fit.Sums(model(mx.ones((2, 4))).square().sum() * batch["scale"], 2.0)

    trainer = Trainer(nn.Linear(4, 1), optim.SGD(0.1), objective=objective, on_oom="split")
    history = trainer.fit([{"scale": np.float32(1.0)}], verbose=0)
    assert np.isfinite(history.history["loss"][0])
