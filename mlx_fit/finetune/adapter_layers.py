"""Layers with a low-rank adapter beside a frozen base: LoRA, and DoRA's magnitudes.

LoRA is ``W + scale * B A`` (Hu et al. 2021, arXiv 2106.09685); DoRA gives every row of that sum a
norm of its own, ``m * (W + scale * B A) / ||W + scale * B A||`` (Liu et al. 2024, arXiv 2402.09353,
section 4.3: no gradient through the norm). Arrays have mlx-lm's names, shapes and formulas, so that
its files are these.
"""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fit.errors import ConfigurationError
from mlx_fit.finetune.blocks import (
    is_embedding,
    is_linear,
    is_quantized,
    is_switch,
    ordered_modules,
)

LEAVES = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class LayerSettings:
    """The adapter of one layer.

    Attributes:
        rank: columns of A. scale: factor of the product, alpha / rank or alpha / sqrt(rank).
        dropout: probability with which A's inputs are zeroed in training.
        dora: whether magnitudes are learnt.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False


class AdapterLayer(nn.Module, ABC):
    """A frozen base layer and its adapter.

    Attributes:
        lora_a, lora_b: the factors; ``m``: DoRA's magnitudes, where it is one.
        settings: rank, scale, dropout.
        enabled: False computes the base alone.
    """

    def __init__(
        self,
        key: str,
        base: nn.Module,
        settings: LayerSettings,
        lora_a: mx.array,
        lora_b: mx.array,
        row_axes: int = 1,
    ) -> None:
        super().__init__()
        self.row_axes = row_axes  # of the weight: the axes that DoRA's magnitudes have
        self.settings = settings
        self.enabled = True
        self.base_key = key
        self[key] = base
        self.dropout = nn.Dropout(settings.dropout)
        self.lora_a = lora_a
        self.lora_b = lora_b
        if settings.dora:
            self.m = self._row_norms(dense_weight(base))
        self.train(base.training)

    @property
    def base(self) -> nn.Module:
        """The layer that is adapted."""
        return self[self.base_key]

    @abstractmethod
    def delta(self) -> mx.array:
        """``scale * B A`` in the shape of the base's weight, float32."""

    def adapted_weight(self) -> mx.array:
        """The weight that base and adapter make together, float32, in the base's shape."""
        weight = dense_weight(self.base).astype(mx.float32) + self.delta()
        if self.settings.dora:
            factors = self.m.astype(mx.float32) / self._row_norms(weight)
            weight = weight * factors.reshape(*factors.shape, *(1,) * (weight.ndim - factors.ndim))
        return weight

    def magnitude(self) -> mx.array:
        """DoRA's factor of each row: its magnitude by its norm, which has no gradient."""
        weight = dense_weight(self.base).astype(mx.float32) + self.delta()
        return self.m / mx.stop_gradient(self._row_norms(weight))

    def merged(self, dtype: mx.Dtype) -> nn.Module:
        """A plain layer with the adapted weight, frozen as the base; never quantized.

        Args:
            dtype: of the weight where the base does not say: the scales of the mx formats are
                integers.
        """
        base = self.base
        plain = _plain_twin(base)
        kept = base.scales.dtype if is_quantized(base) else base.weight.dtype
        kept = kept if mx.issubdtype(kept, mx.floating) else dtype
        plain.weight = self.adapted_weight().astype(kept)
        if "bias" in base:
            plain.bias = base.bias
        plain.train(base.training)
        plain.freeze(recurse=False)
        return plain

    def _row_norms(self, weight: mx.array) -> mx.array:
        rows = weight.astype(mx.float32).reshape(*weight.shape[: self.row_axes], -1)
        return mx.linalg.norm(rows, axis=-1)

    def _extra_repr(self) -> str:
        kind = "dora" if self.settings.dora else "lora"
        return f"{kind}, rank={self.settings.rank}, scale={self.settings.scale:g}"


class LoRALinear(AdapterLayer):
    """A linear or quantized linear layer: ``lora_a`` (in, rank), ``lora_b`` (rank, out)."""

    def __init__(self, base: nn.Module, settings: LayerSettings) -> None:
        num_out, num_in = dense_shape(base)
        lora_a = _uniform(num_in, (num_in, settings.rank))
        super().__init__("linear", base, settings, lora_a, mx.zeros((settings.rank, num_out)))

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled:
            return self.linear(x)
        z = self.settings.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)
        if not self.settings.dora:
            return self.linear(x) + z.astype(x.dtype)
        y = (x @ dense_weight(self.linear).T) + z.astype(x.dtype)
        y = self.magnitude().astype(x.dtype) * y
        return y + self.linear.bias if "bias" in self.linear else y

    def delta(self) -> mx.array:
        """Shape (out, in)."""
        return _product(self.lora_b.T, self.lora_a.T, self.settings.scale)


class LoRAEmbedding(AdapterLayer):
    """An embedding: ``lora_a`` (rows, rank), ``lora_b`` (rank, dims). Serves tied outputs too."""

    def __init__(self, base: nn.Module, settings: LayerSettings) -> None:
        num_rows, num_dims = dense_shape(base)
        lora_a = _uniform(num_rows, (num_rows, settings.rank))
        super().__init__("embedding", base, settings, lora_a, mx.zeros((settings.rank, num_dims)))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding(x)
        if not self.enabled:
            return y
        z = self.settings.scale * (self.lora_a[x] @ self.lora_b)
        out = y + self.dropout(z).astype(y.dtype)
        if self.settings.dora:
            norms = mx.stop_gradient(mx.linalg.norm(y.astype(mx.float32) + z, axis=-1))
            out = (self.m[x] / norms)[..., None].astype(y.dtype) * out
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        """The output projection of a tied model."""
        y = self.embedding.as_linear(x)
        if not self.enabled:
            return y
        z = self.settings.scale * ((self.dropout(x) @ self.lora_b.T) @ self.lora_a.T)
        out = y + z.astype(x.dtype)
        return self.magnitude().astype(x.dtype) * out if self.settings.dora else out

    def delta(self) -> mx.array:
        """Shape (rows, dims)."""
        return _product(self.lora_a, self.lora_b, self.settings.scale)


class LoRASwitchLinear(AdapterLayer):
    """A linear layer of experts: ``lora_a`` (experts, r, in), ``lora_b`` (experts, out, r)."""

    def __init__(self, base: nn.Module, settings: LayerSettings) -> None:
        experts, num_out, num_in = dense_shape(base)
        lora_a = _uniform(num_in, (experts, settings.rank, num_in))
        lora_b = mx.zeros((experts, num_out, settings.rank))
        super().__init__("linear", base, settings, lora_a, lora_b, row_axes=2)
        self.num_experts = experts
        self.input_dims = num_in
        self.output_dims = num_out

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if not self.enabled:
            return y
        z = self.dropout(x)
        for factor in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
            )
        z = (self.settings.scale * z).astype(x.dtype)
        if not self.settings.dora:
            return y + z
        bias = mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else 0
        factors = mx.expand_dims(self.magnitude()[indices], -2).astype(x.dtype)
        return factors * (y - bias + z) + bias

    def delta(self) -> mx.array:
        """Shape (experts, out, in)."""
        return _product(self.lora_b, self.lora_a, self.settings.scale)


class LoRAConv(AdapterLayer):
    """A convolution of one group: ``lora_a`` (rank, kernel..., in), ``lora_b`` (rank, out)."""

    def __init__(self, base: nn.Module, settings: LayerSettings) -> None:
        num_out, *kernel = dense_shape(base)
        if base.groups != 1:
            raise ConfigurationError(
                f"{type(base).__name__} has {base.groups} groups; adapters are for convolutions of "
                "one group. Leave it out of targets."
            )
        lora_a = _uniform(math.prod(kernel), (settings.rank, *kernel))
        super().__init__("conv", base, settings, lora_a, mx.zeros((settings.rank, num_out)))

    def __call__(self, x: mx.array) -> mx.array:
        conv = self.conv
        if not self.enabled:
            return conv(x)
        hidden = mx.conv_general(
            self.dropout(x).astype(self.lora_a.dtype),
            self.lora_a,
            stride=conv.stride,
            padding=conv.padding,
            kernel_dilation=conv.dilation,
        )
        z = (self.settings.scale * (hidden @ self.lora_b)).astype(x.dtype)
        if not self.settings.dora:
            return conv(x) + z
        bias = conv.bias if "bias" in conv else 0
        return self.magnitude().astype(x.dtype) * (conv(x) - bias + z) + bias

    def delta(self) -> mx.array:
        """Shape (out, kernel..., in)."""
        flat = _product(self.lora_b.T, self.lora_a.reshape(len(self.lora_a), -1), 1.0)
        return self.settings.scale * flat.reshape(-1, *self.lora_a.shape[1:])


def adapters_of(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of a model by dotted name."""
    return {n: m for n, m in ordered_modules(model) if isinstance(m, AdapterLayer)}


def require_adapters(model: nn.Module) -> dict[str, AdapterLayer]:
    """The same, of a model that must have some.

    Raises:
        ConfigurationError: it has none.
    """
    layers = adapters_of(model)
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no adapters. apply_lora() or load_adapters() puts some on."
        )
    return layers


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by dotted name, adapted layers as their bases."""
    modules = dict(ordered_modules(model))
    return {n: m.base if isinstance(m, AdapterLayer) else m for n, m in modules.items()}


def is_adaptable(module: nn.Module) -> bool:
    """Whether there is an adapter for this kind of layer."""
    return _adapter_class(module) is not None


def adapt(name: str, base: nn.Module, settings: LayerSettings) -> AdapterLayer:
    """The adapter layer of a base layer.

    Raises:
        ConfigurationError: there is none for this kind.
    """
    kind: Any = _adapter_class(base)
    if kind is None:
        raise ConfigurationError(
            f"targets: {name} is a {type(base).__name__}; adapters are for linear, quantized, "
            "embedding, switch and one- and two-dimensional convolution layers."
        )
    return kind(base, settings)


def _adapter_class(module: nn.Module) -> type | None:
    if is_linear(module):
        return LoRALinear
    if is_embedding(module):
        return LoRAEmbedding
    if is_switch(module):
        return LoRASwitchLinear
    return LoRAConv if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None


# --- base layers ----------------------------------------------------------------------------------


def dense_weight(layer: nn.Module) -> mx.array:
    """A layer's weight, unpacked if it is quantized."""
    if not is_quantized(layer):
        return layer.weight
    scaling = layer.get("global_scale")
    if scaling is not None and scaling.ndim:  # one scale an expert
        parts = [
            mx.dequantize(
                layer.weight[i],
                layer.scales[i],
                None,
                group_size=layer.group_size,
                bits=layer.bits,
                mode=layer.mode,
                global_scale=scaling[i],
            )
            for i in range(len(scaling))
        ]
        return mx.stack(parts)
    options = {} if scaling is None else {"global_scale": scaling}
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        **options,
    )


def dense_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, unpacked."""
    *outer, last = layer.weight.shape
    return (*outer, last * 32 // layer.bits if is_quantized(layer) else last)


def _plain_twin(base: nn.Module) -> nn.Module:
    """A layer like ``base`` that is not quantized, whose weight is still to be set."""
    shape = dense_shape(base)
    if isinstance(base, nn.QuantizedLinear):
        return nn.Linear(shape[1], shape[0], bias=False)
    if isinstance(base, nn.QuantizedEmbedding):
        return nn.Embedding(*shape)
    if is_quantized(base):  # mlx-lm's experts, whose module has the plain class beside this one
        name = type(base).__name__.removeprefix("Quantized")
        kind: Any = getattr(sys.modules[type(base).__module__], name)
        return kind(shape[2], shape[1], shape[0], bias=False)
    twin = copy.copy(base)
    twin._no_grad = set(base._no_grad)
    return twin


def _product(left: mx.array, right: mx.array, scale: float) -> mx.array:
    return scale * (left.astype(mx.float32) @ right.astype(mx.float32))


def _uniform(fan_in: int, shape: tuple[int, ...]) -> mx.array:
    bound = 1 / math.sqrt(fan_in)
    return mx.random.uniform(-bound, bound, shape)
