"""What people write who come from PyTorch, and what takes its place."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_fit.errors import DataError

# What PyTorch code calls on losses, tensors and modules, and what takes its place here.
REPLACED = {
    "backward": "return the loss; the trainer differentiates it",
    "manual_backward": "return the loss; the trainer differentiates it",
    "optimizers": "return the loss; the trainer updates the weights",
    "zero_grad": "return the loss; gradients are made anew for every update",
    "detach": "use mx.stop_gradient(x)",
    "requires_grad_": "use module.freeze() or module.unfreeze()",
    "requires_grad": "use module.freeze() or module.unfreeze()",
    "cuda": "leave it out: arrays are in unified memory; DeviceConfig chooses the device",
    "to": "leave it out, or use x.astype(dtype); DeviceConfig chooses the device",
    "device": "leave it out: arrays are in unified memory; DeviceConfig chooses the device",
    "cpu": "leave it out: arrays are in unified memory",
    "numpy": "leave values as arrays inside of a step: it is compiled",
    "register_hook": "MLX has no hooks on gradients; use mx.custom_function",
    "register_forward_hook": "MLX has no hooks; override __call__",
    "clip_gradients": "give clip_norm= or clip_value= to the trainer",
    "float": "use x.astype(mx.float32)",
    "long": "use x.astype(mx.int32)",
    "permute": "use x.transpose(...)",
    "unsqueeze": "use mx.expand_dims(x, axis)",
    "dim": "use x.ndim",
    "numel": "use x.size",
    "expand": "use mx.broadcast_to(x, shape)",
    "repeat": "use mx.tile(x, repeats)",
    "contiguous": "leave it out",
    "clone": "leave it out: no operation changes an array that others hold",
    "masked_fill": "use mx.where(mask, value, x)",
    "chunk": "use mx.split(x, count, axis)",
    "softmax": "use mx.softmax(x, axis)",
    "relu": "use nn.relu(x)",
    "half": "use x.astype(mx.float16), for a model model.set_dtype(mx.float16); precision= casts",
    "grad": "use GradientMonitor to watch gradients; nn.value_and_grad returns them",
    "retain_grad": "nn.value_and_grad returns gradients; GradientMonitor watches them",
    "state_dict": "use model.parameters(), or interop.torch.export_weights(model)",
    "load_state_dict": "use interop.torch.load_weights(model, source)",
    "named_parameters": "use mlx.utils.tree_flatten(model.trainable_parameters())",
    "register_buffer": "set the array as an attribute and freeze it: self.freeze(keys=[name])",
    "register_parameter": "set the array as an attribute",
    "add_module": "set the module as an attribute",
}


# Names of PyTorch's operations in place, without the last "_", where MLX's name is another.
_IN_PLACE = {
    "mul": "multiply",
    "sub": "subtract",
    "div": "divide",
    "clamp": "clip",
    "zero": "zeros_like",
    "fill": "full",
    "pow": "power",
    "copy": "array",
    "masked_fill": "where",
    "neg": "negative",
}

# What is there in MLX too, but not as PyTorch has it: beginnings of errors, and what to do.
_MISUSED = [
    (r"^view\(\): incompatible", "use x.reshape(...); MLX's view changes the dtype"),
    (r"kwargs = \{.*\bdim\b", "PyTorch's dim= is axis= in MLX, keepdim= is keepdims="),
    (r"kwargs = \{.*\bkeepdim\b", "PyTorch's keepdim= is keepdims= in MLX"),
    (
        r"^'int' object is not callable",
        "if it is x.size(): in MLX x.size is the number of elements; use x.shape",
    ),
    (
        r"^'array' object is not callable",
        "if it is optimizer.step(): in MLX that is the number of updates; return the loss, and the "
        "trainer updates the weights",
    ),
    (
        r"\[eval\] Attempting to eval an array during function transformations",
        "a step is compiled: .item(), float(x), .tolist() and `if x:` cannot read values in it. "
        "Return or log arrays, use mx.where, or debug with Trainer(compile=False)",
    ),
    (
        r"must be Tensor, not (mlx\.core\.)?array",
        "torch's functions take no MLX arrays: use those of mlx.core and mlx.nn; torch's losses "
        "have names here, such as loss='cross_entropy'",
    ),
]


def explain(error: Exception) -> None:
    """Add a note to the error of code that treats MLX's objects as PyTorch's.

    >>> try:
    ...     mx.array(1.0).backward()
    ... except AttributeError as error:
    ...     explain(error)
    ...     error.__notes__
    ['MLX has no .backward: return the loss; the trainer differentiates it.']
    """
    if isinstance(error, AttributeError):
        remedy = replacement(error.name or "")
        if remedy and isinstance(error.obj, (mx.array, nn.Module, optim.Optimizer)):
            error.add_note(f"MLX has no .{error.name}: {remedy}.")
    elif isinstance(error, (TypeError, ValueError)):
        text = str(error)
        for pattern, remedy in _MISUSED:
            if re.search(pattern, text):
                error.add_note(f"{remedy[0].upper()}{remedy[1:]}.")
                return


def replacement(name: str) -> str | None:
    """What takes the place of PyTorch's ``name``, where that is known.

    >>> replacement("add_")
    'MLX has no operations in place: write x = mx.add(...)'
    """
    if name in REPLACED:
        return REPLACED[name]
    plain = name.removesuffix("_")
    if plain == name or plain.startswith("_") or not hasattr(mx, _IN_PLACE.get(plain, plain)):
        return None
    return f"MLX has no operations in place: write x = mx.{_IN_PLACE.get(plain, plain)}(...)"


def no_variance(error: Exception, rank: int | None, splits: bool) -> DataError | None:
    """The error to raise where BatchNorm was given one row alone; None for any other error.

    Args:
        error: what the model has raised.
        rank: of this process, if there are others.
        splits: whether batches may be computed in parts.
    """
    if not isinstance(error, ValueError) or "more than one value per channel" not in str(error):
        return None
    if rank is None:
        found = "the batch has one row"
        remedy = "Use another batch_size, or drop_last=True of a DataLoader"
    else:
        found = f"rank {rank}'s share of the batch is one row"
        remedy = (
            "Each rank normalises its own share: give batch_size two rows or more for each rank, "
            "and drop_last=True of a DataLoader if the last batch has fewer"
        )
    if splits:
        found = found.replace(" is ", " or a part of it is ").replace("has", "or a part of it has")
        remedy += ". Where memory has no room for two rows, use nn.GroupNorm or nn.LayerNorm"
    return DataError(f"BatchNorm needs more than one value per channel, and {found}. {remedy}.")
