"""Low-rank adapters beside the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.checks import boolean, natural, number
from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.adapter_layers import AdapterLayer, LayerSettings, adapt, adapters_of
from mlx_fit.finetune.blocks import listed, ordered_modules, replace
from mlx_fit.finetune.select import freeze
from mlx_fit.finetune.targets import by_pattern, in_last_layers, targeted

BIASES = ("none", "all", "lora_only")


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Iterable[str] | str | None = None,
    dora: bool = False,
    *,
    last_layers: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    bias: str = "none",
) -> list[str]:
    """Put low-rank adapters beside layers, in place, and freeze everything else.

    The model computes what it did before until the adapters are trained. Their arrays are float32.

    Args:
        model: any ``mlx.nn.Module``. Its linear, quantized linear, embedding, switch (experts) and
            convolution layers can be adapted.
        rank: of the product ``B A``.
        alpha: the product is scaled by ``alpha / rank``.
        dropout: probability with which the adapters' inputs are zeroed in training.
        targets: names of layers, or ends of names in whole components (``"q_proj"``,
            ``"self_attn.q_proj"``), or shell patterns of whole names. None: every linear layer in
            the blocks, never the head.
        dora: learns a magnitude for each row as well (DoRA, arXiv 2402.09353).
        last_layers: adapts only the last so many blocks; layers outside of blocks as targeted.
        rank_pattern: a target's name, written as in ``targets`` -> its rank.
        alpha_pattern: the same for alpha.
        rslora: scales by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732).
        bias: which biases train as well: ``"none"``, ``"all"`` or ``"lora_only"``, those of the
            adapted layers.

    Returns:
        The dotted names of the adapted layers.

    Raises:
        ConfigurationError: a target matches no layer (lists those there are), or an argument cannot
            work; the model is then as before.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> apply_lora(model, rank=2, targets=["layers.2"])
        ['layers.2']
        >>> model.layers[2].lora_a.shape, model.layers[2].lora_b.shape
        ((8, 2), (2, 2))
    """
    natural("rank", rank, 1)
    number("alpha", alpha, above=0.0)
    boolean("dora", dora)
    boolean("rslora", rslora)
    number("dropout", dropout, 0.0, below=1.0)
    if bias not in BIASES:
        raise ConfigurationError(f"bias={bias!r}; expected one of {', '.join(map(repr, BIASES))}.")
    if present := adapters_of(model):
        raise ConfigurationError(
            f"The model has adapters already, on {listed(present)}. merge() them, or take them off "
            "with detach(), before applying new ones."
        )
    names = targeted(model, targets)
    if last_layers is not None:
        names = in_last_layers(model, names, last_layers)
    ranks = by_pattern("rank_pattern", rank_pattern, names, rank)
    alphas = by_pattern("alpha_pattern", alpha_pattern, names, alpha)
    settings = {}
    for name in names:
        natural("rank_pattern", ranks[name], 1)
        scale = number("alpha_pattern", alphas[name], above=0.0)
        scale /= math.sqrt(ranks[name]) if rslora else ranks[name]
        settings[name] = LayerSettings(int(ranks[name]), scale, float(dropout), dora)
    with_bias = _with_bias(model, bias, names)
    attach_layers(model, settings)
    for layer in with_bias:
        layer.unfreeze(recurse=False, keys=["bias"])
    return names


def attach_layers(model: nn.Module, settings: Mapping[str, LayerSettings]) -> None:
    """Freeze a model and adapt the layers named; all of them, or none if one cannot be."""
    modules = dict(ordered_modules(model))
    made: dict[int, AdapterLayer] = {}  # a layer that two places share gets one adapter
    layers = {}
    for name, setting in settings.items():
        base = modules[name]
        if id(base) not in made:
            made[id(base)] = adapt(name, base, setting)
        layers[name] = made[id(base)]
    freeze(model)
    for name, layer in layers.items():
        replace(model, name, layer)


def _with_bias(model: nn.Module, bias: str, names: list[str]) -> list[nn.Module]:
    """The modules whose bias trains."""
    if bias == "none":
        return []
    modules = dict(ordered_modules(model))
    layers = [modules[name] for name in names] if bias == "lora_only" else modules.values()
    found = [layer for layer in layers if isinstance(layer.get("bias"), mx.array)]
    if not found:
        where = "no adapted layer" if bias == "lora_only" else "no layer"
        raise ConfigurationError(f"bias={bias!r}, but {where} has a bias. Leave bias out.")
    return found
