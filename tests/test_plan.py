"""What is predicted of memory, against what is measured; and that planning leaves no trace."""

from __future__ import annotations

import gc
import re
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toys import trainer_of

from mlx_fit import DataError, DataLoader, DeviceConfig, LambdaCallback, MemoryPlan, Trainer
from mlx_fit.batch import TextBatch
from mlx_fit.errors import ConfigurationError
from mlx_fit.plan import Growth, measure, sizes_of, smaller_batches
from mlx_fit.runtime import memory

MB = 1e6


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm(16)
        self.head = nn.Linear(16, 10)

    def __call__(self, x):
        return self.head(nn.relu(self.norm(self.conv(x))).mean((1, 2)))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(200, 64)
        self.blocks = [nn.TransformerEncoderLayer(64, 4, 128) for _ in range(2)]
        self.head = nn.Linear(64, 200)

    def __call__(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(x)


def case(kind):
    """A model and a batch for it."""
    rng = np.random.default_rng(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10))
        return model, (rng.normal(size=(512, 256)).astype(np.float32), rng.integers(0, 10, 512))
    if kind == "cnn":
        return Image(), (
            rng.normal(size=(64, 16, 16, 3)).astype(np.float32),
            rng.integers(0, 10, 64),
        )
    return Words(), (rng.integers(0, 200, (16, 32)), rng.integers(0, 200, (16, 32)))


OPTIMIZERS = {
    "sgd": lambda: optim.SGD(0.01, momentum=0.9),
    "adamw": lambda: optim.AdamW(1e-3),
    "adafactor": lambda: optim.Adafactor(1e-3),
}


def make(kind="mlp", optimizer="adamw", **options):
    gc.collect()
    mx.random.seed(0)
    model, batch = case(kind)
    mx.eval(model.state)
    return Trainer(model, OPTIMIZERS[optimizer](), "cross_entropy", **options), batch


def measured_peak(trainer, batch):
    """The highest peak of a steady step of ``fit``, by MLX's own counter."""
    peaks = []
    watch = LambdaCallback(
        on_train_batch_begin=lambda *_: mx.reset_peak_memory(),
        on_train_batch_end=lambda *_: peaks.append(mx.get_peak_memory()),
    )
    trainer.fit([batch] * 8, callbacks=watch, verbose=0)
    return max(peaks)


@pytest.mark.filterwarnings("ignore:precision='bfloat16'")
@pytest.mark.parametrize(
    ("kind", "optimizer", "options"),
    [
        ("mlp", "sgd", {}),
        ("mlp", "adamw", {}),
        ("mlp", "adamw", {"gradient_accumulation": 4}),
        ("mlp", "adamw", {"compile": False}),
        ("mlp", "adafactor", {"precision": "bfloat16"}),
        ("cnn", "adamw", {}),
        ("cnn", "sgd", {"precision": "mixed_bfloat16", "gradient_accumulation": 4}),
        ("transformer", "adamw", {}),
        ("transformer", "adamw", {"precision": "mixed_bfloat16"}),
    ],
    ids=str,
)
def test_the_predicted_peak_is_the_measured_one_within_15_percent(kind, optimizer, options):
    trainer, batch = make(kind, optimizer, **options)
    peak = trainer.plan(batch).peak_bytes
    assert 0.85 < peak / measured_peak(trainer, batch) < 1.15


def state(trainer):
    arrays = dict(tree_flatten(trainer.model.state))
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(trainer.optimizer.state)}
    arrays["key"] = mx.random.state[0]
    return {k: np.array(v) for k, v in arrays.items() if isinstance(v, mx.array)}


def assert_untouched(trainer, before, kept):
    after = state(trainer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    modes = [module.training for module in trainer.model.modules()]
    assert (modes, trainer.step, trainer.epoch, trainer.history) == kept


def kept_of(trainer):
    modes = [module.training for module in trainer.model.modules()]
    return modes, trainer.step, trainer.epoch, trainer.history


@pytest.mark.parametrize("rows", [2, 3, 37])
def test_a_model_that_refuses_one_row_is_planned_from_two_on(rows):
    layers = nn.Linear(256, 64), nn.BatchNorm(64), nn.Linear(64, 10)
    trainer = Trainer(nn.Sequential(*layers), OPTIMIZERS["adamw"](), "cross_entropy")
    x, y = case("mlp")[1]
    before, kept = state(trainer), kept_of(trainer)
    plan = trainer.plan((x[:rows], y[:rows]))
    assert plan.peak_bytes > plan.parts["weights"]
    assert_untouched(trainer, before, kept)
    with pytest.raises(ValueError, match="more than one value"):
        trainer.plan((x[:1], y[:1]))


def test_a_first_row_that_weighs_nothing_does_not_hide_the_others():
    trainer, (x, y) = make()
    weights = np.array([0.0] + [1.0] * (len(x) - 1), np.float32)
    plain, weighted = trainer.plan((x, y)), trainer.plan((x, y, weights))
    assert weighted.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.2)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 3}, {"compile": False}], ids=str)
def test_planning_changes_no_bit(trained, options):
    trainer, (x, y) = make("cnn", **options)
    trainer.model.norm.eval()
    if trained:
        trainer.fit([(x[:8], y[:8])], verbose=0)
    before, kept = state(trainer), kept_of(trainer)
    initialised = trainer.optimizer._initialized
    trainer.plan((x[:16], y[:16]))
    assert_untouched(trainer, before, kept)
    assert trainer.optimizer._initialized == initialised


def test_a_run_after_a_plan_has_the_bits_of_one_without():
    runs = []
    for plans in (False, True):
        trainer, (x, y) = make("mlp", batch_size=64, seed=1)
        if plans:
            trainer.plan((x[:64], y[:64]))
        trainer.fit((x, y), epochs=2, verbose=0)
        runs.append(state(trainer))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value, err_msg=name)


def test_planning_that_fails_changes_no_bit_either():
    trainer, (x, y) = make("mlp")
    forward, rows = trainer.model.layers[0].__class__.__call__, []

    class Failing(nn.Linear):
        def __call__(self, x):
            rows.append(x.shape[0])
            if x.shape[0] > 4:
                raise ZeroDivisionError("a bug of the user's")
            return forward(self, x)

    trainer.model.layers[0].__class__ = Failing
    before, kept = state(trainer), kept_of(trainer)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.plan((x, y))
    assert max(rows) > 4
    assert "(16, 256) float32" in "".join(caught.value.__notes__)
    assert_untouched(trainer, before, kept)


def test_the_parts_add_up_and_are_what_the_arrays_take():
    trainer, batch = make("mlp", "sgd")
    plan = trainer.plan(batch)
    per_row = plan.parts["activations_per_example"]
    weights = sum(v.nbytes for _, v in tree_flatten(trainer.model.parameters()))
    assert plan.parts["weights"] == plan.parts["gradients"] == weights
    assert plan.parts["optimizer"] == pytest.approx(weights, abs=100)
    added = [plan.parts[k] for k in ("weights", "gradients", "optimizer", "other", "activations")]
    assert sum(added) == plan.peak_bytes
    # A row has 256 inputs, 512 hidden numbers, and gradients of them.
    assert 4 * (256 + 512) < per_row < 4 * (256 + 8 * 512)


def test_half_as_many_rows_have_the_peak_that_was_suggested():
    trainer, (x, y) = make("cnn")
    [peak] = [
        s.peak_bytes for s in trainer.plan((x, y)).suggestions if "batch_size=32 " in s.change
    ]
    half, _ = make("cnn", gradient_accumulation=2)
    assert 0.85 < peak / measured_peak(half, (x[:32], y[:32])) < 1.15


def test_blocks_that_are_recomputed_and_half_precision_are_measured():
    trainer, batch = make("transformer")
    helps = [suggestion.change for suggestion in trainer.plan(batch).suggestions]
    assert any("apply_lora" in change for change in helps)  # of few rows it saves most
    batch = tuple(np.concatenate([part] * 6) for part in batch)
    plan = trainer.plan(batch)
    changes = {s.change: s.peak_bytes for s in plan.suggestions}
    half = changes.get('precision="mixed_bfloat16"', plan.peak_bytes)
    other, _ = make("transformer", precision="mixed_bfloat16")
    ratio = half / measured_peak(other, batch)
    recomputed = [v for k, v in changes.items() if "checkpoint_layers" in k]
    assert 0.7 < ratio < 1.3
    assert recomputed
    assert recomputed[0] < plan.peak_bytes
    assert list(changes.values()) == sorted(changes.values())


def test_the_largest_micro_batch_fits_and_twice_as_many_rows_do_not():
    trainer, (x, y) = make("cnn", device_config=DeviceConfig(memory_limit="8MB"))
    plan = trainer.plan((x, y))
    assert not plan.fits
    assert plan.limit_bytes == 8_000_000
    size = plan.largest_micro_batch
    assert 1 < size < 64
    peaks = [measured_peak(make("cnn")[0], (x[:n], y[:n])) for n in (size, 2 * size)]
    assert peaks[0] < 8.5 * MB < peaks[1]


def test_the_table_shows_parts_bars_and_what_helps():
    trainer, batch = make("mlp", device_config=DeviceConfig(memory_limit="1MB"))
    text = str(trainer.plan(batch))
    for word in ("weights", "gradients", "optimizer", "activations", "peak", "limit", "█"):
        assert word in text
    assert "Does not fit. What would help:" in text
    assert "largest micro-batch that fits: none" in text


def test_a_single_row_can_be_planned():
    trainer, (x, y) = make("mlp")
    plan = trainer.plan((x[:1], y[:1]))
    assert isinstance(plan, MemoryPlan)
    assert (plan.batch_size, plan.fits) == (1, True)


def test_the_processs_own_peak_survives_a_plan():
    trainer, (x, y) = make("mlp")
    mx.eval(mx.zeros((4_000_000,)) + 1)
    before = memory.peak_bytes()
    trainer.plan((x[:8], y[:8]))
    assert memory.peak_bytes() >= before


def test_a_plan_needs_an_optimizer_rows_and_a_loss():
    x = np.ones((4, 4), np.float32)
    with pytest.raises(ConfigurationError, match="no optimizer"):
        Trainer(nn.Linear(4, 1), None, "mse").plan((x, x[:, :1]))
    with pytest.raises(ConfigurationError, match="no loss"):
        Trainer(nn.Linear(4, 1), optim.SGD(0.1)).plan((x, x[:, :1]))
    for rows in (0, 4):
        with pytest.raises(DataError, match="has no rows"):
            trainer_of().plan((x[:rows], np.zeros((0, 3), np.float32)))
    with pytest.raises(DataError, match="weigh nothing"):
        trainer_of().plan((x, np.ones((4, 3), np.float32), np.zeros(4, np.float32)))


X, Y = np.ones((8, 4), np.float32), np.zeros((8, 3), np.float32)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((X, Y[:6]), r"as many rows: x: \(8, 4\) float32, y: \(6, 3\)"),
        ((X[:6], Y), r"as many rows: x: \(6, 4\)"),
        ((X, Y, np.ones(5)), r"weights: \(5,\)"),
        (["a text", "another"], "got text; expected a batch of arrays"),
        ({"text": ["a text"]}, "got text"),
        ([(X, Y)] * 4, r"got a list of batches; .*plan\(batches\[0\]\)"),
        ([TextBatch(X, X, X, X)] * 2, "got a list of batches"),
        (DataLoader((X, Y), batch_size=2), r"got a DataLoader; .*next\(iter\(loader\)\)"),
        (iter([(X, Y)]), "got a list_iterator"),
        (8, "does not begin with an array"),
        ([[1, 2], [3, 4]], "Turn lists of numbers into arrays"),
    ],
)
def test_what_is_no_batch_is_said_to_be_none(batch, says):
    with pytest.raises(DataError, match=says):
        trainer_of().plan(batch)


def test_a_function_may_get_arrays_of_other_lengths():
    """Such as what all rows are compared with: the trainer does not know which are rows."""

    def objective(model, batch):
        return model(batch["x"]).mean() + batch["other"].sum()

    trainer = Trainer(nn.Linear(4, 1), optim.SGD(0.1), objective=objective)
    assert trainer.plan({"x": X, "other": np.ones(3, np.float32)}).batch_size == 8


def test_several_inputs_and_outputs_in_a_list_are_one_batch():
    class Pair(nn.Linear):
        def __call__(self, x):
            return super().__call__(x[0]), super().__call__(x[1])

    def loss(outputs, targets):
        return sum(((o - t) ** 2).mean(1) for o, t in zip(outputs, targets, strict=True))

    trainer = Trainer(Pair(4, 3), optim.SGD(0.1), loss)
    assert trainer.plan([(X, X), (Y, Y)]).batch_size == 8


@pytest.mark.parametrize(("rows", "suggested"), [(2, []), (3, [2]), (4, [2]), (5, [3]), (6, [3])])
def test_one_row_is_not_suggested_where_it_cannot_be_computed(rows, suggested):
    probe = Growth(((2, 100), (3, 150)), 50.0, 0, 0)
    found = smaller_batches(probe, rows, 1000, 1)
    assert [int(re.findall(r"batch_size=(\d+)", s.change)[0]) for s in found] == suggested
    layers = nn.Linear(256, 64), nn.BatchNorm(64), nn.Linear(64, 10)
    trainer = Trainer(nn.Sequential(*layers), optim.SGD(0.1), "cross_entropy")
    x, y = case("mlp")[1]
    assert "batch_size=1 " not in str(trainer.plan((x[:rows], y[:rows])))


def test_rows_without_divisors_are_cut_into_nearly_equal_parts():
    [suggestion] = smaller_batches(Growth(((1, 10),), 10.0, 0, 0), 37, 1000, 2)
    assert suggestion == ("batch_size=19 with gradient_accumulation=4 (updates of 76 rows)", 190)
    [suggestion] = smaller_batches(Growth(((1, 10),), 10.0, 0, 0), 36, 150, 1)
    assert suggestion == ("batch_size=12 with gradient_accumulation=3", 120)


def test_only_what_makes_the_peak_smaller_is_suggested():
    """In a small model copies of the weights in half precision take more than they save."""
    for size in (4, 512):
        trainer = Trainer(nn.Linear(256, size), optim.SGD(0.1), "cross_entropy")
        plan = trainer.plan((case("mlp")[1][0][:8], np.zeros(8, np.int32)))
        assert all(suggestion.peak_bytes < plan.peak_bytes for suggestion in plan.suggestions)
        assert ("What would help" in str(plan)) == bool(plan.suggestions)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64, 1000])
def test_no_more_than_a_quarter_is_measured_of_a_batch_that_has_one(rows):
    sizes = sizes_of(rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] <= max(rows / 4, 2 if rows >= 4 else 1)
    assert all(b <= 4 * a + 3 for a, b in pairwise(sizes))


def test_growth_is_read_between_and_beyond_its_points():
    growth = Growth(((1, 100), (2, 110), (4, 150)), 30.0, 0, 0)
    assert [growth.at(n) for n in (1, 2, 3, 4, 6)] == [100, 110, 130, 150, 210]
    assert [growth.largest(n) for n in (99, 100, 130, 210, 239)] == [0, 1, 3, 6, 6]


def test_no_less_is_predicted_than_gradients_alone_need():
    """Few rows, in bytes a row: 4,219 of a step whose update takes the most, 6,719 of gradients."""
    probe = SimpleNamespace(
        largest_bytes=0,
        window_bytes=0,
        peak=lambda batch, rows: 2_000_000 + 4219 * rows,
        gradient_peak=lambda batch, rows: 850_000 + 6719 * rows,
    )
    growth = measure(probe, np.zeros((512, 1), np.float32), 10**9)
    assert growth.at(512) > probe.gradient_peak(None, 512)
