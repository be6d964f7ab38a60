"""What people write who come from PyTorch, and what takes its place."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

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
    "view": "use x.reshape(...); MLX's view changes the dtype",
    "permute": "use x.transpose(...)",
    "unsqueeze": "use mx.expand_dims(x, axis)",
    "size": "use x.shape; x.size is the number of elements",
}


def explain(error: Exception) -> None:
    """Add a note to the error of code that treats MLX's objects as PyTorch's.

    >>> try:
    ...     mx.array(1.0).backward()
    ... except AttributeError as error:
    ...     explain(error)
    ...     error.__notes__
    ['MLX has no .backward: return the loss; the trainer differentiates it.']
    """
    if not isinstance(error, AttributeError) or error.name not in REPLACED:
        return
    if isinstance(error.obj, (mx.array, nn.Module, optim.Optimizer)):
        error.add_note(f"MLX has no .{error.name}: {REPLACED[error.name]}.")
