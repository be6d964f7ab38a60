"""Objectives: (model, batch) -> what to minimise and what to count.

An objective hands the step a :class:`Terms`: the mean loss of this (micro-)batch, which is
differentiated, the weight of that mean, and the additive states of the metrics. Means of different
batches, micro-batches and ranks are combined by their weights and divided once, so any way of
cutting the data gives the same numbers.

May import: ``losses``, ``metrics`` (layer 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit import losses, metrics
from mlx_fit._tree import leaves
from mlx_fit.batch import num_rows, unpack
from mlx_fit.checks import number
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.logs import Compute, divide
from mlx_fit.losses import Loss
from mlx_fit.metrics import Metric
from mlx_fit.metrics.base import each_counts_once
from mlx_fit.weighting import (
    host_sum,
    mean_loss,
    metric_weights,
    reciprocal,
    sum_of_counted,
)

State = dict[str, mx.array]
HALF = (mx.float16, mx.bfloat16)
RESERVED = frozenset({"loss", "learning_rate", "grad_norm", "skipped_updates", "epoch", "step"})
NOT_LABELS = 0  # in place of a number of classes: the targets are probabilities


class Sums(NamedTuple):
    """What an objective may return: sums, so that any split of the data adds up.

    Attributes:
        loss: sum of the (weighted) losses, a scalar; its gradient is divided by ``weight``.
        weight: sum of the weights: rows, or target tokens, ...
        metrics: name -> (sum, weight), each divided when it is read.
    """

    loss: mx.array
    weight: mx.array | float
    metrics: Mapping[str, tuple[mx.array, mx.array | float]] = {}


@dataclass
class Terms:
    """What the step needs of one (micro-)batch.

    Attributes:
        mean: the mean loss, a float32 scalar: what is differentiated.
        weight: what ``mean`` weighs. A Python number where shapes alone decide it.
        states: key -> additive state of everything that is logged.
        rows: key -> state of metrics that need every row.
        computes: key -> how its value is computed from its state on the host.
    """

    mean: mx.array
    weight: mx.array | float
    states: dict[str, State] = field(default_factory=dict)
    rows: dict[str, State] = field(default_factory=dict)
    computes: dict[str, Compute] = field(default_factory=dict)

    def count(self, key: str, mean: mx.array, weight: mx.array | float) -> None:
        """Log ``mean`` under ``key``, weighing ``weight``."""
        mean = mean.astype(mx.float32)
        if isinstance(weight, mx.array):
            # A mean over nothing is 0 / 0 for a user's own function; its weight 0 must win.
            mean = mx.where(weight > 0, mean, 0.0)
        self.states[key] = {"sum": mean * weight, "weight": mx.array(weight, mx.float32)}
        self.computes[key] = divide


class Objective(ABC):
    """What a trainer minimises.

    Attributes:
        variant: what a trace depends on beside shapes, a constant that can be hashed;
            :meth:`host_weight` sets it for its batch.
    """

    variant: Any

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        """The terms of one batch. Runs while the step is traced: no values, only shapes."""

    @abstractmethod
    def host_weight(self, batch: Any) -> float | None:
        """Check a batch that is still on the host, and say what it weighs.

        Returns None where only the device knows.

        Raises:
            DataError: a class label is out of range, which MLX itself would not notice.
        """

    @abstractmethod
    def start(self, model: nn.Module) -> None:
        """A new run: forget what earlier traces told of the model."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Training is about to meet its first batch of a shape: check what needs a run of its own.

        Raises:
            ConfigurationError: the model would compute something else than is meant.
        """

    @property
    @abstractmethod
    def directions(self) -> dict[str, bool | None]:
        """Key -> whether higher is better, None where nobody declared it."""


class FunctionObjective(Objective):
    """``f(model, batch)`` returning a scalar, ``(scalar, {name: scalar})`` or :class:`Sums`.

    A scalar weighs the batch's number of rows.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.variant = False
        self._function = function
        self._names: set[str] = set()

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        result = self._function(model, batch)
        if isinstance(result, Sums):
            return self._from_sums(result)
        loss, named = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(named, Mapping):
            raise ConfigurationError(
                f"The objective returned (loss, {type(named).__name__}); expected a scalar, "
                "(scalar, {name: scalar}) or Sums(loss, weight)."
            )
        loss = _scalar("The objective's loss", loss)
        weight = num_rows(batch)
        terms = Terms(loss.astype(mx.float32), weight)
        terms.count("loss", loss, weight)
        for name, value in named.items():
            check_name(name)
            terms.count(name, _scalar(f"The objective's {name!r}", mx.array(value)), weight)
        self._names.update(named)
        return terms

    def _from_sums(self, sums: Sums) -> Terms:
        loss = _scalar("Sums.loss", sums.loss)
        mean = loss.astype(mx.float32) * reciprocal(sums.weight)
        terms = Terms(mean, sums.weight)
        terms.states["loss"] = _pair(loss, sums.weight)
        terms.computes["loss"] = divide
        for name, (value, weight) in sums.metrics.items():
            check_name(name)
            terms.states[name] = _pair(value, weight)
            terms.computes[name] = divide
        self._names.update(sums.metrics)
        return terms

    def host_weight(self, batch: Any) -> float | None:
        """Unknown: the function may return :class:`Sums` that are weighed on the device."""
        return None

    def start(self, model: nn.Module) -> None:
        """Nothing is known of the model."""

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """The function checks for itself."""

    @property
    def directions(self) -> dict[str, bool | None]:
        """``loss`` is better lower; a function's own values have no direction."""
        return dict.fromkeys(self._names) | {"loss": False}


class Supervised(Objective):
    """Loss and metrics of ``model(x)`` against ``y``.

    Args:
        loss: a name, a :class:`~mlx_fit.losses.Loss`, ``f(outputs, targets)``, or a dict of these
            by output name for a model that returns a dict.
        loss_weights: output name -> factor of its loss in the total (default 1).
        metrics: names, metrics or functions; for several outputs a list (computed for each) or a
            dict by output name. Keys are then ``<output>_<metric>``.

    With several outputs each loss is averaged over its own targets, as PyTorch does, and a batch
    weighs its rows. So gradient accumulation over several outputs is exact as long as their targets
    count in the same proportion in every batch: with labels that are ignored, or weights by output,
    each batch's own averages are combined.
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Mapping[str, float] | None = None,
        metrics: Any = (),
    ) -> None:
        self.variant = False  # whether some labels of the batch may be ignored
        self._named = isinstance(loss, Mapping)
        if self._named and not loss:
            raise ConfigurationError("loss={} names no output; give at least one.")
        self._losses = _by_output(loss, losses.get)
        self._metrics = _metrics_by_output(metrics, list(self._losses), self._named)
        given = (loss_weights or {}).items()
        self._loss_weights = {name: number(f"loss_weights[{name!r}]", w) for name, w in given}
        if unknown := set(self._loss_weights) - (set(self._losses) if self._named else set()):
            raise ConfigurationError(
                f"loss_weights names {sorted(unknown)}, but the loss has "
                f"{sorted(self._losses) if self._named else 'one unnamed output'}."
            )
        self._num_classes: dict[str, int] = {}

    # --- on the device, while tracing ------------------------------------------------------------

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        x, y, weights = unpack(batch)
        if y is None:
            raise DataError(_no_targets(batch))
        outputs = float32(forward(model, x))
        rows = num_rows(batch)
        terms = Terms(mx.array(0.0), rows)
        parts: dict[str, tuple[mx.array, mx.array | float]] = {}
        counted: list[tuple[str, Any, mx.array, mx.array, Any]] = []
        for name, loss in self._losses.items():
            output = _pick(outputs, name, "outputs", loss.takes_trees)
            target = _pick(y, name, "targets", loss.takes_trees)
            weight = weights[name] if isinstance(weights, dict) else weights
            mask = loss.mask(target, output) if self.variant else None
            if loss.class_indices:
                is_labels = loss.is_labels(target, output)
                self._num_classes[name] = output.shape[-1] if is_labels else NOT_LABELS
            # Nothing is ignored in most batches; then the mask's work is left out of the step.
            values = loss(output, target) if self.variant else loss.function(output, target)
            if not isinstance(values, mx.array):
                raise ConfigurationError(
                    f"The loss {loss.name!r} returned {values!r}; expected an mx.array: losses of "
                    "shape (batch, ...), or a scalar mean. Is its return statement missing?"
                )
            # Where targets can be ignored, a batch weighs those that count, and so it must in
            # batches where all of them do.
            per_target = loss.ignore_index is not None and loss.is_labels(target, output)
            shape = values.shape if per_target else (rows,)
            parts[name] = mean_loss(values, weight, mask, shape)
            clean = target if mask is None else mx.where(mask > 0, target, 0).astype(target.dtype)
            marked: Any = each_counts_once if weight is None and mask is None else nullcontext
            counted.append((name, output, clean, metric_weights(weight, mask, shape), marked))
        self._add_losses(terms, parts, weights, rows)
        for name, output, target, weight, marked in counted:
            for metric in self._metrics[name]:
                key = f"{name}_{metric.name}" if self._named else metric.name
                with marked(weight):
                    self._add_metric(terms, key, metric, output, target, weight)
        return terms

    def _add_losses(
        self,
        terms: Terms,
        parts: Mapping[str, tuple[mx.array, mx.array | float]],
        weights: Any,
        rows: int,
    ) -> None:
        factors = [self._loss_weights.get(name, 1.0) for name in parts]
        if len(parts) == 1:
            [(mean, terms.weight)] = parts.values()
            terms.mean = mean if factors == [1.0] else factors[0] * mean
            terms.count("loss", terms.mean, terms.weight)
            return
        means = [factor * mean for factor, (mean, _) in zip(factors, parts.values(), strict=True)]
        terms.mean = sum(means[1:], means[0])
        shared = None if isinstance(weights, dict) else weights
        terms.weight = rows if shared is None else shared.astype(mx.float32).sum()
        terms.states["loss"] = {}
        terms.computes["loss"] = partial(_total_loss, dict(zip(parts, factors, strict=True)))
        for name, (mean, weight) in parts.items():
            terms.count(f"{name}_loss", mean, weight)
            # The total is put together from what each output has added up over the whole pass.
            pair = terms.states[f"{name}_loss"].items()
            terms.states["loss"] |= {f"{name}.{part}": value for part, value in pair}

    @staticmethod
    def _add_metric(
        terms: Terms, key: str, metric: Metric, output: Any, target: mx.array, weight: mx.array
    ) -> None:
        check_name(key)
        if key in terms.computes:
            raise ConfigurationError(f"Two metrics are called {key!r}; rename one with name=.")
        state = metric.update(output, target, weight)
        (terms.rows if metric.collects else terms.states)[key] = state
        terms.computes[key] = metric.compute

    def start(self, model: nn.Module) -> None:
        """The model may have another number of classes now."""
        self._num_classes = {}

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """The trace shows what does not fit."""

    # --- on the host ------------------------------------------------------------------------------

    def host_weight(self, batch: Any) -> float | None:
        """Check class labels, and sum the weights of the targets that count."""
        if type(batch) is tuple and len(batch) == 2:  # most batches; calls are counted
            y, weights = batch[1], None
        else:
            _, y, weights = unpack(batch)
        if self._named:
            return self._named_weight(y, weights)
        loss, num_classes = self._losses[""], self._num_classes.get("")
        if not loss.class_indices or num_classes == NOT_LABELS:
            self.variant = loss.ignore_index is not None and num_classes != NOT_LABELS
            return host_sum(weights)
        if isinstance(y, mx.array):
            self.variant = loss.ignore_index is not None
            return None if self.variant else host_sum(weights)
        y = y if type(y) is np.ndarray else np.asarray(y)
        if y.dtype.kind not in "iu":
            self.variant = False
            return host_sum(weights)
        num_counted = loss.check(y, num_classes)
        self.variant = num_counted < y.size
        if weights is None or num_counted == 0:
            return num_counted
        if self.variant and not isinstance(weights, mx.array):
            return sum_of_counted(np.asarray(weights), y != loss.ignore_index)
        return host_sum(weights)

    def _named_weight(self, y: Any, weights: Any) -> float | None:
        self.variant = any(loss.ignore_index is not None for loss in self._losses.values())
        for name, loss in self._losses.items():
            target = y.get(name) if isinstance(y, dict) else None
            num_classes = self._num_classes.get(name)
            is_checked = loss.class_indices and num_classes != NOT_LABELS
            if is_checked and type(target) is np.ndarray and target.dtype.kind in "iu":
                loss.check(target, num_classes)
        if not isinstance(weights, dict):
            return host_sum(weights)
        sums = [host_sum(part) for part in weights.values()]
        return None if None in sums else sum(part for part in sums if part is not None)

    @property
    def directions(self) -> dict[str, bool | None]:
        """Losses are better lower; metrics say it themselves."""
        found: dict[str, bool | None] = {"loss": False}
        for name in self._losses:
            if self._named:
                found[f"{name}_loss"] = False
            for metric in self._metrics[name]:
                key = f"{name}_{metric.name}" if self._named else metric.name
                found[key] = metric.higher_is_better
        return found


def check_name(name: str) -> None:
    """Raise for a name that the trainer itself logs under."""
    if name in RESERVED or name.startswith("val_"):
        raise ConfigurationError(
            f"{name!r} is a name that the trainer logs under itself; give the value another one."
        )


def as_objective(loss: Any, metric_specs: Any, objective: Any) -> Objective | None:
    """The objective of a trainer's ``loss``, ``metrics`` and ``objective`` arguments, or None."""
    if objective is None:
        if loss is None:
            if metric_specs:
                raise ConfigurationError("metrics= needs a loss=: without one nothing compares.")
            return None
        return Supervised(loss, metrics=metric_specs)
    if loss is not None:
        raise ConfigurationError("Give either loss= or objective=, not both.")
    if metric_specs:
        raise ConfigurationError(
            "metrics= goes with loss=. An objective returns its own: (loss, {name: value}), or "
            "Supervised(loss, metrics=[...])."
        )
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise ConfigurationError(
            f"objective={objective!r} is not callable; expected f(model, batch) -> scalar."
        )
    return FunctionObjective(objective)


def direction_of(
    objective: Objective | None, key: str, validation_sets: Sequence[str]
) -> bool | None:
    """Whether a higher value of a logged key is better, ``val_`` keys included; None: unknown."""
    known = {} if objective is None else objective.directions
    prefixes = ["", "val_", *(f"val_{name}_" for name in validation_sets if name)]
    for prefix in prefixes:
        if key.startswith(prefix) and key.removeprefix(prefix) in known:
            return known[key.removeprefix(prefix)]
    return None


def forward(model: nn.Module, x: Any) -> Any:
    """``model(**x)`` for a dict of inputs, else ``model(x)``."""
    return model(**x) if isinstance(x, dict) else model(x)


def float32(outputs: Any) -> Any:
    """Floating-point outputs as float32, so that losses and metrics are computed in it."""
    if isinstance(outputs, mx.array):
        return outputs.astype(mx.float32) if outputs.dtype in HALF else outputs
    if isinstance(outputs, dict):
        return {key: float32(value) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        values = [float32(value) for value in outputs]
        if isinstance(outputs, list):
            return values
        return type(outputs)(*values) if hasattr(outputs, "_fields") else tuple(values)
    return outputs


def _total_loss(factors: Mapping[str, float], state: Mapping[str, np.ndarray]) -> float | None:
    """The weighted sum of the outputs' mean losses; None where nothing was counted."""
    means = {
        name: divide({part: state[f"{name}.{part}"] for part in ("sum", "weight")})
        for name in factors
    }
    counted = [factors[name] * mean for name, mean in means.items() if mean is not None]
    return sum(counted) if counted else None


def _no_targets(batch: Any) -> str:
    """Why a batch has no targets, and what to change."""
    expected = "the loss needs targets; expected a tuple (x, y) or (x, y, weights)"
    if isinstance(batch, dict):
        return (
            f"The batch is a dict with {', '.join(map(str, batch))}, but {expected}. Read a table "
            "with target='its column', turn rows into pairs with "
            "Map(dataset, lambda row, rng: (row['x'], row['y'])), or pass "
            "objective=f(model, batch), which gets the dict."
        )
    if hasattr(batch, "_fields"):
        return (
            f"The batch is a NamedTuple {type(batch).__name__}({', '.join(batch._fields)}), but "
            f"{expected}. Make it a plain tuple, or pass objective=f(model, batch), which gets it."
        )
    return f"The batch has no targets, but {expected}. Or pass objective= instead of loss=."


def _pair(total: mx.array, weight: mx.array | float) -> State:
    return {"sum": mx.array(total, mx.float32), "weight": mx.array(weight, mx.float32)}


def _scalar(what: str, value: Any) -> mx.array:
    if not isinstance(value, mx.array) or value.size != 1:
        found = tuple(value.shape) if isinstance(value, mx.array) else type(value).__name__
        raise ConfigurationError(
            f"{what} is {found}; expected a scalar mx.array: a mean, or Sums(loss, weight)."
        )
    return value.reshape(())


def _by_output(spec: Any, get: Callable[[Any], Loss]) -> dict[str, Loss]:
    if isinstance(spec, Mapping):
        return {str(name): get(value) for name, value in spec.items()}
    return {"": get(spec)}


def _metrics_by_output(specs: Any, names: list[str], named: bool) -> dict[str, list[Metric]]:
    if isinstance(specs, Mapping):
        if not named:
            raise ConfigurationError(
                f"metrics is a dict for the outputs {sorted(specs)}, but the loss is for one "
                "output; give the loss as a dict too, or metrics as a list."
            )
        if unknown := set(specs) - set(names):
            raise ConfigurationError(
                f"metrics names the outputs {sorted(unknown)}; the loss has {sorted(names)}."
            )
        return {name: _metric_list(specs.get(name, ())) for name in names}
    return {name: _metric_list(specs) for name in names}


def _metric_list(specs: Any) -> list[Metric]:
    if isinstance(specs, (str, Metric)) or not isinstance(specs, Sequence):
        specs = [specs]
    return [metrics.get(spec) for spec in specs]


def _pick(tree: Any, name: str, what: str, takes_trees: bool) -> Any:
    """The array of an output by its name, or everything for the one unnamed output."""
    if name == "":
        if takes_trees or isinstance(tree, mx.array):
            return tree
        paths = [path for path, _ in leaves(tree)]
        raise ConfigurationError(
            f"The {what} are {paths}, several arrays, but the loss is for one. Give "
            "loss={name: ...} for a dict of outputs, or a function of (outputs, targets)."
        )
    if not isinstance(tree, dict) or name not in tree:
        have = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ConfigurationError(f"The loss names the output {name!r}; the {what} have {have}.")
    return tree[name]
