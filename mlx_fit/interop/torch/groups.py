"""Groups of parameters with settings of their own, as PyTorch's optimizers take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_fit._tree import named_arrays
from mlx_fit.checks import boolean
from mlx_fit.errors import ConfigurationError

Pattern = str | Callable[[str, mx.array], bool]


def param_groups(
    model: nn.Module,
    make: Callable[..., optim.Optimizer],
    groups: Sequence[Mapping[str, Any]] = (),
    *,
    no_decay: bool = False,
    **defaults: Any,
) -> optim.Optimizer:
    """An optimizer that treats groups of parameters differently.

    Args:
        model: the model whose trainable parameters are grouped.
        make: an optimizer class, MLX's or one of :mod:`mlx_fit.interop.torch.optimizers`.
        groups: dicts with ``"params"``, which names the parameters, and the settings that differ.
            ``"params"`` is a dotted beginning (``"encoder"``), a pattern with ``*``
            (``"*.bias"``), a function of name and array, or a list of these. The first group that
            fits a parameter counts; what fits none has the defaults.
        no_decay: give ``weight_decay=0`` to biases, all vectors and what norms hold.
        defaults: settings of all groups.

    Returns:
        A ``MultiOptimizer``, or a plain one where there is a single group.

    Raises:
        ConfigurationError: a group has no parameters, or ``no_decay`` without ``weight_decay``.

    Example:
        >>> import mlx.nn as nn, mlx.optimizers as optim
        >>> from mlx_fit.interop.torch import param_groups
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> groups = [{"params": "layers.0", "learning_rate": 1e-4}]
        >>> optimizer = param_groups(
        ...     model, optim.AdamW, groups, no_decay=True, learning_rate=1e-3, weight_decay=0.1
        ... )
        >>> [(part.learning_rate.item() < 1e-3, part.weight_decay) for part in optimizer.optimizers]
        [(True, 0.1), (True, 0.0), (False, 0.0), (False, 0.1)]
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; expected an mlx.nn.Module.")
    boolean("no_decay", no_decay)
    arrays = dict(named_arrays(model.trainable_parameters()))
    undecayed = _undecayed(model, arrays) if no_decay else set()
    parts: list[tuple[set[str], dict[str, Any]]] = []
    left = dict(arrays)
    for group in groups:
        chosen = _chosen(group, left, arrays)
        left = {name: array for name, array in left.items() if name not in chosen}
        settings = {key: value for key, value in group.items() if key != "params"}
        parts += _split(chosen, {**defaults, **settings}, undecayed)
    # The last part takes all that no filter takes, so the defaults with decay stand last.
    rest = _split(set(left), dict(defaults), undecayed)
    parts += rest[::-1] or [(set(), dict(defaults))]
    optimizers = [make(**settings) for _, settings in parts]
    if len(optimizers) == 1:
        return optimizers[0]
    return GroupedOptimizer(optimizers, [_filter(names) for names, _ in parts[:-1]])


class GroupedOptimizer(optim.MultiOptimizer):
    """MLX's ``MultiOptimizer``, also for models with lists of layers of which some hold nothing.

    MLX (0.32) merges the trees of the parts, and fails where one list is shorter than another.
    """

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The new parameters, by the names of the gradients."""
        updated: list[tuple[str, mx.array]] = []
        for part, own in zip(self.optimizers, self._split_dictionary(gradients), strict=True):
            updated += named_arrays(part.apply_gradients(own, parameters))
        return tree_unflatten(updated)


def _filter(names: set[str]) -> Callable[..., bool]:
    return lambda name, _: name in names


def _split(
    names: set[str], settings: dict[str, Any], undecayed: set[str]
) -> list[tuple[set[str], dict[str, Any]]]:
    without = names & undecayed
    if without and "weight_decay" not in settings:
        raise ConfigurationError("no_decay=True needs weight_decay=, from which it takes some out.")
    parts = [(names - without, settings), (without, {**settings, "weight_decay": 0.0})]
    return [(part, options) for part, options in parts if part]


def _chosen(
    group: Mapping[str, Any], left: Mapping[str, mx.array], arrays: Mapping[str, mx.array]
) -> set[str]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise ConfigurationError(f"groups holds {group!r}; expected a dict with 'params'.")
    given = group["params"]
    patterns = given if isinstance(given, (list, tuple)) else [given]
    for pattern in patterns:
        if not (isinstance(pattern, str) or callable(pattern)):
            raise ConfigurationError(
                f"'params' holds a {type(pattern).__name__}; expected names, such as 'encoder' or "
                "'*.bias', or a function of name and array. MLX's optimizers find parameters by "
                "name, not by object."
            )
    chosen = {n for n, array in left.items() if any(_fits(p, n, array) for p in patterns)}
    if not chosen:
        taken = any(_fits(p, n, array) for n, array in arrays.items() for p in patterns)
        why = "only parameters of earlier groups" if taken else "no trainable parameter"
        raise ConfigurationError(
            f"The group 'params': {given!r} fits {why}. They are: {', '.join(arrays)}."
        )
    return chosen


def _fits(pattern: Pattern, name: str, array: mx.array) -> bool:
    if callable(pattern):
        return bool(pattern(name, array))
    is_beginning = name == pattern or name.startswith(f"{pattern}.")
    return is_beginning or (bool(re.search(r"[*?\[]", pattern)) and fnmatchcase(name, pattern))


def _undecayed(model: nn.Module, arrays: Mapping[str, mx.array]) -> set[str]:
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    return {
        name
        for name, array in arrays.items()
        if array.ndim < 2 or name.split(".")[-1] == "bias" or _is_in(name, norms)
    }


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
