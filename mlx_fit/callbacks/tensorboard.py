"""Curves, histograms and pictures for TensorBoard, written with tensorboardX."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fit._tree import named_arrays
from mlx_fit.callbacks.base import Callback, numbers
from mlx_fit.callbacks.board_hparams import experiment, session_end, session_start
from mlx_fit.callbacks.event_files import EventFile, purge
from mlx_fit.callbacks.pictures import as_pixels, heat_map, png
from mlx_fit.checks import natural, path_of
from mlx_fit.errors import ConfigurationError
from mlx_fit.runtime.memory import active_bytes, cache_bytes, peak_bytes

BY_EPOCH = ("epoch_", "perf/", "weights/")
COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")
MIB = 2**20


class TensorBoard(Callback):
    """Writes to ``log_dir/train`` and ``log_dir/validation``, so that curves overlay.

    Tags are Keras's: ``epoch_loss`` and the other values by epoch (0-based),
    ``epoch_learning_rate``, ``evaluation_loss_vs_iterations`` by step, and with a batch frequency
    ``batch_loss`` by batches since the fit began. ``perf/step_time_ms``, ``perf/data_wait_ms``
    (from the end of a batch to the next), ``perf/examples_per_second`` (where batches are made
    here), ``perf/tokens_per_second`` (target tokens, where an objective logs ``num_tokens``) and
    ``perf/active_memory_mib``, ``perf/cache_memory_mib``, ``perf/peak_memory_mib`` are
    by epoch; evaluations and saves are no part of an epoch's time there.

    A logged matrix (``confusion_matrix``) becomes a picture, each row scaled by itself; a dict of
    numbers (``layer_grad_norms``) a curve for each name; a dict of lists ``{"true_positives": ...,
    "false_positives": ..., "true_negatives": ..., "false_negatives": ...}``, by rising threshold,
    a precision-recall curve.

    A run that is resumed from a checkpoint, or by ``initial_epoch``, continues its curves: what
    the files hold from later than that is removed from them.

    Args:
        log_dir: the run's folder. Several validation sets go to ``validation_<set>``.
        histogram_freq: every so many epochs a histogram of each parameter is written
            (``weights/<name>``); 0 writes none.
        update_freq: ``"epoch"``; or ``"batch"`` or every so many batches, which also writes the
            running means after those batches. Only there values are read from the device.
        write_graph: must be False: MLX keeps no graph of a model. It is Keras's argument.
        hparams: whether hyperparameters and final metrics (``final_<key>``) go to the page of that
            name, from the folder ``hparams``; a dict adds your own (numbers, texts, booleans).

    Raises:
        ConfigurationError: an argument cannot work.

    Example:
        >>> board = TensorBoard("runs/a", hparams={"width": 128})
        >>> # in a callback: board.add_image("samples", images); board.add_text("note", "hello")
    """

    first_rank_only = True

    def __init__(
        self,
        log_dir: str | Path = "runs",
        histogram_freq: int = 0,
        update_freq: int | str = "epoch",
        write_graph: bool = False,
        hparams: bool | Mapping[str, Any] = True,
    ) -> None:
        if write_graph is not False:
            raise ConfigurationError(
                f"TensorBoard(write_graph={write_graph!r}): MLX keeps no graph of a model that "
                "could be drawn; leave the argument out. trainer.summary() shows the layers."
            )
        self.log_dir = path_of("TensorBoard: log_dir", log_dir)
        self._histogram_freq = natural("TensorBoard: histogram_freq", histogram_freq)
        self._every = _batches_between(update_freq)
        self._own_hparams = _checked_hparams(hparams)
        self._hparams: dict[str, Any] = {}
        self._writers: dict[str, EventFile] = {}
        self._is_running = False
        self._num_batches = 0
        self._num_epochs = 0
        self._first_step = 0
        # A batch costs no detour through this class, and without a batch frequency nothing.
        if self._every and type(self).on_train_batch_end is Callback.on_train_batch_end:
            self.on_train_batch_end = self._write_batch  # type: ignore[method-assign]

    # --- hooks ------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any) -> None:
        """Open the file, and count batches from the start of this fit."""
        self._close()
        self._num_batches, self._num_epochs = 0, self.trainer.info.initial_epoch
        self._hparams = {}
        if self._num_epochs:
            first = self._num_epochs
            self._purge(lambda tag, step: not tag.startswith(BY_EPOCH) or step < first)
        self._is_running = True
        self._writer("train")  # a folder that cannot be written shows before training, not after

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        """Note where the epoch starts."""
        self._first_step = self.trainer.step

    def _write_batch(self, batch: int, logs: Any) -> None:
        self._num_batches += 1
        if self._num_batches % self._every == 0:
            self._write("train", "batch_{}", logs, self._num_batches)

    def on_validation_end(self, logs: Any) -> None:
        """Write an evaluation by its step."""
        for name, values in self._by_set(logs).items():
            self._write(name, "evaluation_{}_vs_iterations", numbers(values), self.trainer.step)

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        """Write the epoch's values."""
        trained = {key: value for key, value in logs.items() if not key.startswith("val_")}
        self._write("train", "epoch_{}", trained, epoch)
        self._write("train", "perf/{}", self._speed(logs), epoch)
        for name, values in self._by_set(logs).items():
            self._write(name, "epoch_{}", values, epoch)
        if self._histogram_freq and (epoch + 1) % self._histogram_freq == 0:
            for name, array in named_arrays(self.model.parameters()):
                self.add_histogram(f"weights/{name}", array, epoch)
        if self._own_hparams is not None and not self._hparams:
            self._start_session(logs)
        self._num_epochs = epoch + 1

    def on_train_end(self, logs: Any) -> None:
        """Close the files."""
        self._end(logs, succeeded=True)

    def on_exception(self, error: BaseException) -> None:
        """Close the files: what was written so far can be looked at."""
        self._end({}, succeeded=False)

    def state_dict(self) -> dict[str, Any]:
        """How far the curves have come."""
        return {
            "num_epochs": self._num_epochs,
            "num_batches": self._num_batches,
            "step": self.trainer.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remove what was written after the checkpoint, and continue the curves."""
        self._num_epochs, self._num_batches = state["num_epochs"], state["num_batches"]

        def is_kept(tag: str, step: int) -> bool:
            if tag.startswith(BY_EPOCH):
                return step < state["num_epochs"]
            return step <= state["num_batches" if tag.startswith("batch_") else "step"]

        self._close()
        self._purge(is_kept)
        self._writer("train")

    # --- helpers for users ------------------------------------------------------------------------

    def add_scalar(self, tag: str, value: Any, step: int | None = None) -> None:
        """Write a number, by default at the run's step."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._add("train", Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]), step)

    def add_text(self, tag: str, text: str, step: int | None = None) -> None:
        """Write a text, which may hold Markdown, by default at the run's step."""
        from tensorboardX import summary

        self._add("train", summary.text(tag, str(text)), step)

    def add_image(self, tag: str, image: Any, step: int | None = None) -> None:
        """Write a picture, by default at the run's step.

        Args:
            tag: its name.
            image: NumPy or MLX, shape ``(height, width)``, ``(height, width, channels)`` or
                ``(images, height, width, channels)``, which become one grid; 1, 3 or 4 channels;
                floats in [0, 1] or integers in [0, 255].
            step: where it stands.
        """
        self._add_pixels("train", tag, as_pixels(image, f"The image {tag!r}"), step)

    def add_histogram(self, tag: str, values: Any, step: int | None = None) -> None:
        """Write a histogram of an array's finite values, by default at the run's step."""
        from tensorboardX import summary

        if isinstance(values, mx.array):
            values = np.array(values.astype(mx.float32))
        flat = np.asarray(values, np.float64).reshape(-1)
        finite = flat[np.isfinite(flat)]
        if finite.size:
            self._add("train", summary.histogram(tag, finite, _edges()), step)

    # --- writing ----------------------------------------------------------------------------------

    def _speed(self, logs: Mapping[str, Any]) -> dict[str, float]:
        pace, seconds = self.trainer.pace, self.trainer.pace.seconds
        num_steps = max(self.trainer.step - self._first_step, 1)
        speed = {
            "step_time_ms": 1e3 * seconds / num_steps,
            "data_wait_ms": pace.wait_ms,
            "active_memory_mib": active_bytes() / MIB,
            "cache_memory_mib": cache_bytes() / MIB,
            "peak_memory_mib": peak_bytes() / MIB,
        }
        if num_rows := self.trainer.info.rows_per_step:
            speed["examples_per_second"] = num_steps * num_rows / seconds
        if num_tokens := logs.get("num_tokens"):
            each = num_tokens / max(self.trainer.num_batches, 1)
            speed["tokens_per_second"] = pace.num_batches * each / seconds
        return speed

    def _by_set(self, logs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Validation values by the folder they go to, without their prefix."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.trainer.info.validation_sets:
            prefix = f"val_{name}_" if name else "val_"
            values = {k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)}
            found[f"validation_{name}" if name else "validation"] = values
        return found

    def _write(self, folder: str, tag: str, values: Mapping[str, Any], step: int) -> None:
        """Write logged values of every kind; what is none of them is left out."""
        scalars = {tag.format(key): value for key, value in numbers(values).items()}
        for key, value in values.items():
            if isinstance(value, Mapping) and not set(COUNTS) <= value.keys():
                named = {k: float(v) for k, v in value.items() if isinstance(v, Real)}
                scalars |= {f"{tag.format(key)}/{name}": number for name, number in named.items()}
            elif isinstance(value, Mapping):
                self._writer(folder).add(_curve(tag.format(key), value), step)
            elif isinstance(value, (list, mx.array, np.ndarray)) and np.ndim(value) == 2:
                self._add_pixels(folder, tag.format(key), heat_map(value), step)
        if scalars:
            self._writer(folder).add_scalars(scalars, step)

    def _add_pixels(self, folder: str, tag: str, pixels: np.ndarray, step: int | None) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        height, width, channels = pixels.shape
        picture = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png(pixels)
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=picture)])
        self._add(folder, summary, step)

    def _add(self, folder: str, summary: Any, step: int | None) -> None:
        """Write something by the user, who may do so outside of a fit as well."""
        run = getattr(self, "trainer", None)
        self._writer(folder).add(summary, (run.step if run else 0) if step is None else step)
        if not self._is_running:
            self._close()

    # --- hyperparameters --------------------------------------------------------------------------

    def _start_session(self, logs: Mapping[str, Any]) -> None:
        """Write the hyperparameters, and which metrics there will be at the end."""
        run, info = self.trainer, self.trainer.info
        facts = {
            "model": type(run.model).__name__,
            "optimizer": type(run.optimizer).__name__,
            "learning_rate": logs.get("learning_rate"),
            "batch_size": info.batch_size or None,
            "epochs": info.epochs,
            **info.arguments,
            **(self._own_hparams or {}),
        }
        self._hparams = {
            key: value for key, value in facts.items() if isinstance(value, (bool, Real, str))
        }
        writer = self._writer("hparams")
        writer.add(experiment(self._hparams, [f"final_{key}" for key in numbers(logs)]))
        writer.add(session_start(self._hparams))

    def _end(self, logs: Mapping[str, Any], succeeded: bool) -> None:
        if self._is_running and self._hparams:
            # In the session's own folder: TensorBoard finds them there wherever it is started.
            self._write("hparams", "final_{}", numbers(logs), self.trainer.step)
            self._writer("hparams").add(session_end(succeeded))
        self._is_running = False
        self._close()

    # --- files ------------------------------------------------------------------------------------

    def _writer(self, folder: str) -> EventFile:
        if folder not in self._writers:
            self._writers[folder] = EventFile(self.log_dir / folder)
        return self._writers[folder]

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _purge(self, is_kept: Any) -> None:
        for folder in ["train", *self._by_set({})]:
            purge(self.log_dir / folder, is_kept)


def _curve(tag: str, counted: Mapping[str, Any]) -> Any:
    """A precision-recall curve, from counts by threshold."""
    from tensorboardX import summary

    counts = [np.asarray(counted[key], np.float64) for key in COUNTS]
    found, wrong, _, missed = counts
    precision = found / np.maximum(found + wrong, 1e-12)
    recall = found / np.maximum(found + missed, 1e-12)
    return summary.pr_curve_raw(tag, *counts, precision, recall, len(found))


def _edges() -> np.ndarray:
    """Where the bins of a histogram begin and end: each a tenth wider than the last, and 0."""
    edges = 1e-12 * 1.1 ** np.arange(775)
    return np.concatenate([-edges[::-1], [0.0], edges])


def _batches_between(update_freq: int | str) -> int:
    """Batches from one written batch to the next; 0 for none."""
    if update_freq == "epoch":
        return 0
    if update_freq == "batch":
        return 1
    if isinstance(update_freq, int) and not isinstance(update_freq, bool) and update_freq > 0:
        return update_freq
    raise ConfigurationError(
        f"TensorBoard(update_freq={update_freq!r}); expected 'epoch', 'batch' or a positive number "
        "of batches."
    )


def _checked_hparams(hparams: Any) -> dict[str, Any] | None:
    """The user's own hyperparameters; None for none at all."""
    if isinstance(hparams, bool):
        return {} if hparams else None
    kinds = (bool, Real, str)
    if isinstance(hparams, Mapping) and all(isinstance(v, kinds) for v in hparams.values()):
        return dict(hparams)
    raise ConfigurationError(
        f"TensorBoard(hparams={hparams!r}); expected True, False, or a dict of numbers, texts and "
        "booleans."
    )
