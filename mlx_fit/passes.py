"""One pass of evaluation or prediction over data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mlx_fit._tree import RandomState
from mlx_fit.callbacks.base import CallbackList
from mlx_fit.communicator import first_known, gather, join_sums, joined_rows
from mlx_fit.data.sources import Source
from mlx_fit.evaluation import EvaluationStep, PredictionStep
from mlx_fit.loop import Step, run_batches
from mlx_fit.modes import evaluation_mode
from mlx_fit.pace import Pace
from mlx_fit.protocols import Run, RunInfo
from mlx_fit.splitting import Splitter, SplittingEvaluation, SplittingPrediction


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


_END = object()


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
                Pace(),
            )
    finally:
        step.is_running = False
        random_state.restore()
    ranks, sums = run.communicator, step.sums
    join_sums(ranks, sums)
    logs = {key: plain(value) for key, value in sums.values().items()}
    uncounted = [key for key in sums.layout.computes or ["loss"] if key not in logs]
    if ranks.size > 1:  # one that has had no batch does not know how to compute them
        known = first_known(ranks, (logs, uncounted) if sums.layout.computes else None)
        logs, uncounted = known or (logs, uncounted)
    if uncounted and not stops():
        names = ", ".join(uncounted)
        warnings.warn(f"Evaluated without {names}: the weights of all rows sum to 0.", stacklevel=4)
    callbacks.call("on_test_end", logs)
    return logs


def predict_pass(
    run: Run,
    step: PredictionStep,
    batches: Iterator[Any],
    callbacks: CallbackList,
    info: RunInfo,
    computing: Callable[[], AbstractContextManager[None]],
    splitter: Splitter | None = None,
) -> Iterator[Any]:
    """The outputs of one batch after another, as NumPy arrays.

    Between batches, while the consumer works, nothing of the pass is in effect.
    """
    taking = step.on_host if splitter is None else SplittingPrediction(step, splitter)
    with computing(), seen_as(run, info):
        callbacks.call("on_predict_begin", {})
    index = 0
    while True:
        with computing(), seen_as(run, info), evaluation_mode(run.model):
            batch = _END if run.stop_predicting else next(batches, _END)
            if _is_last(run, batch):
                break
            if index == 0:
                step.start()
            callbacks.call("on_predict_batch_begin", index, {})
            has_rows = batch is not _END and batch is not None
            outputs = taking(batch) if has_rows else None
            if run.communicator.size > 1:
                outputs = joined_rows(run.communicator, outputs)
            callbacks.call("on_predict_batch_end", index, {"outputs": outputs})
        try:
            yield outputs
        except GeneratorExit:
            break  # the consumer has enough: a normal end
        index += 1
    with computing(), seen_as(run, info):
        callbacks.call("on_predict_end", {})


def _is_last(run: Run, batch: Any) -> bool:
    """Whether there are no more batches: for several ranks, on none of them."""
    ranks, has_ended = run.communicator, batch is _END
    if ranks.size == 1:
        return has_ended
    votes = gather(ranks, [has_ended, run.stop_predicting], "predictions")
    return all(ended for ended, _ in votes) or any(stops for _, stops in votes)


def plain(value: Any) -> Any:
    """A logged value as Python floats; a matrix as nested lists."""
    return value.tolist() if hasattr(value, "tolist") else value
