"""The base of all callbacks, with Keras's hooks, and the list that calls them."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit.errors import CheckpointMismatchError, ConfigurationError
from mlx_fit.protocols import Run


class Callback:
    """Watches a run. Override the hooks you need; the others cost nothing.

    ``logs`` is one mutable mapping per call, shared down the list of callbacks. After a batch
    ``logs["loss"]`` is the running mean over the epoch and ``logs.batch["loss"]`` this batch's
    value; both are read from the device only when touched.

    A hook may freeze layers, change their settings and modes or those of the optimizer, and put
    other layers in place: the next batch is computed so. The step is then compiled anew, so what
    changes with every batch belongs in an array.

    Attributes:
        trainer: the run, once it has started.
        params: ``{"verbose", "epochs", "steps"}``.
        runs_last: whether it is called after all others, history and progress included, because
            what it saves holds their state.
        due_at: None: told of the end of every training batch. A callback that only displays sets
            it to the ``time.perf_counter()`` from which on it wants to be told of the next.
        layer_norms_every: updates from one for which the step is to log ``layer_grad_norms`` to
            the next; 0: it need not.
        first_rank_only: with several ranks it is called on rank 0 alone, because it writes or
            prints. It must not call what all ranks do together.

    Example:
        >>> class Announce(Callback):
        ...     def on_epoch_end(self, epoch, logs):
        ...         print(f"epoch {epoch + 1}: {logs['loss']:.3f}")
    """

    trainer: Run
    params: dict[str, Any]
    due_at: float | None = None
    runs_last: bool = False
    layer_norms_every: int = 0
    first_rank_only: bool = False

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.trainer.model

    def on_train_begin(self, logs: Any) -> None:
        """Called once when ``fit`` starts, before the first batch."""

    def on_train_end(self, logs: Any) -> None:
        """Called when ``fit`` ends normally, with the last epoch's logs."""

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Called before an epoch (0-based)."""

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Called after an epoch and its validation, with the values of both."""

    def on_train_batch_begin(self, batch: int, logs: Any) -> None:
        """Called before a training batch (0-based within the epoch)."""

    def on_train_batch_end(self, batch: int, logs: Any) -> None:
        """Called after a training batch."""

    def on_test_begin(self, logs: Any) -> None:
        """Called before an evaluation, also before validation in ``fit``."""

    def on_test_end(self, logs: Any) -> None:
        """Called after an evaluation, with its values (without ``val_``)."""

    def on_test_batch_begin(self, batch: int, logs: Any) -> None:
        """Called before a batch of evaluation."""

    def on_test_batch_end(self, batch: int, logs: Any) -> None:
        """Called after a batch of evaluation."""

    def on_predict_begin(self, logs: Any) -> None:
        """Called before ``predict``."""

    def on_predict_end(self, logs: Any) -> None:
        """Called after ``predict``."""

    def on_predict_batch_begin(self, batch: int, logs: Any) -> None:
        """Called before a batch of prediction."""

    def on_predict_batch_end(self, batch: int, logs: Any) -> None:
        """Called after a batch of prediction; ``logs["outputs"]`` holds its outputs."""

    def on_validation_end(self, logs: Any) -> None:
        """Called after each validation in ``fit``, with ``val_`` values, before the epoch's end.

        With ``validation_freq="500 steps"`` this happens inside epochs.
        """

    def on_save_begin(self, logs: Any) -> None:
        """Called while ``fit`` runs before it, or a callback, writes weights or a checkpoint."""

    def on_save_end(self, logs: Any) -> None:
        """Called when training goes on; in the background the files may still be written."""

    def on_exception(self, error: BaseException) -> None:
        """Called when ``fit`` ends by an exception, which then goes on to the caller."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for this callback to go on: plain values and arrays."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class HookWatcher(Callback, ABC):
    """Is told of the hooks of all callbacks of a run, whose calls it may wrap."""

    @abstractmethod
    def watched(
        self, owner: Callback, hook: str, method: Callable[..., None]
    ) -> Callable[..., None]:
        """What is called instead of a callback's hook.

        Args:
            owner: the callback.
            hook: its hook, such as ``"on_epoch_end"``.
            method: what was to be called.
        """


HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


class CallbackList:
    """Callbacks in the order they are called.

    Args:
        callbacks: one callback, or (nested) lists of them.
        run: what they watch.
        params: what they get as ``params``.
        is_first: whether those are called that write on rank 0 only.
    """

    def __init__(
        self, callbacks: Any, run: Run, params: dict[str, Any], is_first: bool = True
    ) -> None:
        self.callbacks = sorted(flatten(callbacks), key=lambda callback: callback.runs_last)
        _refuse_repeated(self.callbacks)
        for callback in self.callbacks:
            _warn_of_unknown_hooks(callback)
            callback.trainer = run
            callback.params = params
        self._called = [c for c in self.callbacks if is_first or not c.first_rank_only]
        self._bound: dict[str, list[Callable[..., None]]] = {}
        self._last: dict[str, list[Callable[..., None]]] = {}
        for hook in HOOKS:
            own = [callback for callback in self._called if _overrides(callback, hook)]
            self._bound[hook] = [self._method(callback, hook) for callback in own]
            self._last[hook] = [self._method(c, hook) for c in own if c.runs_last]

    def _method(self, callback: Callback, hook: str) -> Callable[..., None]:
        method = getattr(callback, hook)
        for watcher in self._called if hook != "on_exception" else []:
            if isinstance(watcher, HookWatcher):
                method = watcher.watched(callback, hook, method)
        return method

    def bound(self, hook: str) -> list[Callable[..., None]]:
        """The methods to call for a hook: only those that somebody wrote."""
        return self._bound[hook]

    def train_batch_end(
        self,
    ) -> tuple[list[Callable[..., None]], list[tuple[Callback, Callable[..., None]]]]:
        """Who is told of the end of every training batch, and who only when it is due."""
        hooks = [c for c in self._called if _overrides(c, "on_train_batch_end")]
        methods = [(c, self._method(c, "on_train_batch_end")) for c in hooks]
        always = [method for callback, method in methods if callback.due_at is None]
        return always, [(c, method) for c, method in methods if c.due_at is not None]

    @property
    def runs_user_code(self) -> bool:
        """Whether batches are told to hooks that are not of this library."""
        hooks = ("on_train_batch_begin", "on_train_batch_end")
        own = [getattr(c, hook) for c in self._called for hook in hooks if _overrides(c, hook)]
        return any(not str(getattr(m, "__module__", "")).startswith("mlx_fit.") for m in own)

    @property
    def layer_norms_every(self) -> int:
        """After how many updates a callback wants the norms of each layer's gradient; 0: never."""
        return math.gcd(*[callback.layer_norms_every for callback in self.callbacks])

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback that has it."""
        for method in self._bound[hook]:
            method(*arguments)

    def state_dict(self) -> dict[str, Any]:
        """The states of all callbacks that have one, by name."""
        named = self._named()
        return {name: c.state_dict() for name, c in named.items() if _has_state(c)}

    def load_state_dict(self, states: Mapping[str, Any]) -> list[str]:
        """Give the callbacks their states back, by name, and say which did not find each other.

        Raises:
            CheckpointMismatchError: a callback cannot take its state back.
        """
        named = {name: c for name, c in self._named().items() if _has_state(c)}
        for name in named.keys() & states.keys():
            if named[name] not in self._called:
                continue
            try:
                named[name].load_state_dict(states[name])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointMismatchError(
                    f"{name} cannot take back its state from the checkpoint, which has "
                    f"{', '.join(states[name])}: {error!r}. Use the class that was saved."
                ) from error
        new = [f"{name} was added" for name in named if name not in states]
        return new + [f"{name} was removed" for name in states if name not in named]

    def _named(self) -> dict[str, Callback]:
        """Callbacks by class name, the second of a class as ``Name#2``."""
        named: dict[str, Callback] = {}
        for callback in self.callbacks:
            name, number = type(callback).__name__, 2
            while name in named:
                name, number = f"{type(callback).__name__}#{number}", number + 1
            named[name] = callback
        return named

    def call_first(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all but those that run last."""
        for method in self._bound[hook][: len(self._bound[hook]) - len(self._last[hook])]:
            method(*arguments)

    def call_last(self, hook: str, *arguments: Any) -> None:
        """Call a hook of those that run last, once what they save is settled."""
        for method in self._last[hook]:
            method(*arguments)

    def report(self, error: BaseException) -> None:
        """Call every ``on_exception``. One that fails itself becomes a note on the error."""
        for method in self._bound["on_exception"]:
            try:
                method(error)
            except Exception as second:
                owner = type(method.__self__).__name__ if hasattr(method, "__self__") else method
                error.add_note(f"{owner}.on_exception failed as well: {second!r}")


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among logged values, NumPy's and MLX's scalars included; matrices are not."""
    found: dict[str, float] = {}
    for key, value in logs.items():
        if isinstance(value, (mx.array, np.ndarray)) and value.ndim == 0:
            value = value.item()  # host synchronisation, for what a user's callback logged
        if isinstance(value, Real):
            found[key] = float(value)
    return found


def flatten(callbacks: Any) -> Iterable[Callback]:
    """One callback, or nested lists (or other iterables) of callbacks, in order."""
    if isinstance(callbacks, Callback):
        yield callbacks
    elif callbacks is None:
        return
    elif isinstance(callbacks, Iterable) and not isinstance(callbacks, (str, bytes, Mapping)):
        for callback in callbacks:
            yield from flatten(callback)
    else:
        raise ConfigurationError(
            f"callbacks holds {callbacks!r}; expected Callback objects. A class needs (), and a "
            "function goes into LambdaCallback(on_epoch_end=...)."
        )


def _refuse_repeated(callbacks: list[Callback]) -> None:
    """One that is called twice an epoch would wait half as long, and write each row twice."""
    for index, callback in enumerate(callbacks):
        if any(callback is other for other in callbacks[:index]):
            raise ConfigurationError(
                f"callbacks holds one {type(callback).__name__} object twice. Make two of them, or "
                "leave one out."
            )


def _overrides(callback: Callback, hook: str) -> bool:
    method = getattr(callback, hook)
    return getattr(method, "__func__", method) is not getattr(Callback, hook)


def _has_state(callback: Callback) -> bool:
    return type(callback).state_dict is not Callback.state_dict


def _warn_of_unknown_hooks(callback: Callback) -> None:
    """A misspelt hook would never be called, and nobody would know."""
    written = dir(type(callback))
    unknown = [name for name in written if name.startswith("on_") and name not in HOOKS]
    if unknown:
        warnings.warn(
            f"{type(callback).__name__} has {', '.join(unknown)}, which no run calls. Hooks are "
            f"{', '.join(HOOKS)}.",
            stacklevel=4,
        )
