"""One pass of evaluation or prediction over data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_fit._tree import RandomState
from mlx_fit.callbacks.base import CallbackList
from mlx_fit.data.sources import Source
from mlx_fit.evaluation import EvaluationStep, PredictionStep
from mlx_fit.loop import Step, run_batches
from mlx_fit.modes import evaluation_mode
from mlx_fit.protocols import Run, RunInfo
from mlx_fit.splitting import Splitter, SplittingEvaluation


def pass_info(kind: str, source: Source, steps: int | None, verbose: int) -> RunInfo:
    """What callbacks are told of a pass: ``kind`` is ``"evaluate"`` or ``"predict"``."""
    size = source.batch_size or 0
    return RunInfo(
        kind,
        steps_per_epoch=source.num_batches if steps is None else steps,
        batch_size=size,
        rows_per_step=size,
        verbose=verbose,
    )


@contextmanager
def seen_as(run: Run, info: RunInfo) -> Iterator[None]:
    """Let callbacks see another ``info`` inside: a pass may happen in the middle of a fit."""
    before, run.info = run.info, info
    try:
        yield
    finally:
        run.info = before


def evaluate_pass(
    run: Run,
    step: EvaluationStep,
    batches: Iterator[Any],
    callbacks: CallbackList,
    stops: Callable[[], bool],
    splitter: Splitter | None = None,
) -> dict[str, Any]:
    """One pass of evaluation: its values. Restores modes and the random key."""
    taking: Step = step if splitter is None else SplittingEvaluation(step, splitter)
    callbacks.call("on_test_begin", {})
    random_state = RandomState()
    step.is_running = True
    try:
        with evaluation_mode(run.model):
            step.start()
            run_batches(
                batches,
                taking,
                callbacks.bound("on_test_batch_begin"),
                callbacks.bound("on_test_batch_end"),
                stops,
            )
    finally:
        step.is_running = False
        random_state.restore()
    sums = step.sums
    logs = {key: plain(value) for key, value in sums.values().items()}
    uncounted = [key for key in sums.layout.computes or ["loss"] if key not in logs]
    if uncounted and not stops():
        names = ", ".join(uncounted)
        warnings.warn(f"Evaluated without {names}: the weights of all rows sum to 0.", stacklevel=3)
    callbacks.call("on_test_end", logs)
    return logs


def predict_pass(
    run: Run,
    step: PredictionStep,
    batches: Iterator[Any],
    callbacks: CallbackList,
    info: RunInfo,
    computing: Callable[[], AbstractContextManager[None]],
) -> Iterator[Any]:
    """The outputs of one batch after another, as NumPy arrays.

    Between batches, while the consumer works, nothing of the pass is in effect.
    """
    with computing(), seen_as(run, info):
        callbacks.call("on_predict_begin", {})
    index = 0
    while True:
        with computing(), seen_as(run, info), evaluation_mode(run.model):
            if run.stop_predicting or (batch := next(batches, None)) is None:
                break
            if index == 0:
                step.start()
            callbacks.call("on_predict_batch_begin", index, {})
            outputs = tree_map(to_numpy, step(batch))
            callbacks.call("on_predict_batch_end", index, {"outputs": outputs})
        try:
            yield outputs
        except GeneratorExit:
            break  # the consumer has enough: a normal end
        index += 1
    with computing(), seen_as(run, info):
        callbacks.call("on_predict_end", {})


def to_numpy(leaf: Any) -> Any:
    """An output on the host; bfloat16, which NumPy does not have, as float32; None stays."""
    if not isinstance(leaf, mx.array):
        return leaf
    return np.array(leaf.astype(mx.float32) if leaf.dtype == mx.bfloat16 else leaf)


def plain(value: Any) -> Any:
    """A logged value as Python floats; a matrix as nested lists."""
    return value.tolist() if hasattr(value, "tolist") else value
