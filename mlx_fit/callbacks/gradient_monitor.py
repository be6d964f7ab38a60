"""How large the gradients of each layer are."""

from __future__ import annotations

from typing import Any

from mlx_fit.callbacks.base import Callback
from mlx_fit.checks import natural
from mlx_fit.errors import ConfigurationError


class GradientMonitor(Callback):
    """Logs the norm of the gradient, of the whole model and of each layer.

    The norms are those of the averaged gradient of an update, before clipping. They are computed
    inside the compiled step and travel with its other sums: nothing waits for the device.
    ``logs["grad_norm"]`` is a number and ``logs["layer_grad_norms"]`` a dict by layer: after a
    batch the means over the epoch so far (``logs.batch[...]``: this batch's update), after an
    epoch, and in the history, the means over its updates. :class:`TensorBoard` writes a curve for
    each layer, :class:`JSONLogger` the dict.

    A layer is a module that owns parameters, by its name in ``model.named_modules()``; a parameter
    of the model itself is named by its own name. Frozen layers are left out.

    On a GPU norms cost little beside a step. On a CPU, where they read every gradient once more,
    ``every=10`` makes them cheap there, too: means are then over every tenth update (an epoch
    without one has none), and the step is compiled twice.

    Args:
        every: updates from one whose norms are measured to the next.
        print_every: epochs between printed tables, largest norm first; None prints none.

    Attributes:
        layer_norms: the norms of the last epoch, by layer.

    Example:
        >>> callback = GradientMonitor(print_every=10)
    """

    def __init__(self, print_every: int | None = None, *, every: int = 1) -> None:
        if print_every is not None and (type(print_every) is not int or print_every < 1):
            raise ConfigurationError(
                f"GradientMonitor: print_every={print_every!r}; expected an integer of at least 1, "
                "or None."
            )
        self.layer_norms_every = natural("GradientMonitor: every", every, 1)
        self._print_every = print_every
        self.layer_norms: dict[str, float] = {}

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Keep the norms, and print them if it is time."""
        self.layer_norms = dict(logs.get("layer_grad_norms", {}))
        if self._print_every and (epoch + 1) % self._print_every == 0:
            print(f"Epoch {epoch + 1}: gradient norms")
            ranked = sorted(self.layer_norms.items(), key=lambda item: -item[1])
            for name, norm in ranked:
                print(f"  {norm:.3e}  {name}")
