"""A run of ``mlx-fit finetune``."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_fit import finetune
from mlx_fit.callbacks.base import Callback
from mlx_fit.callbacks.early_stopping import EarlyStopping
from mlx_fit.callbacks.json_logger import JSONLogger
from mlx_fit.callbacks.lambda_callback import LambdaCallback
from mlx_fit.checkpoint.policy import CheckpointPolicy
from mlx_fit.cli.best_adapters import MONITOR, BestAdapters
from mlx_fit.cli.dry_run import print_batch
from mlx_fit.cli.language_models import Loaded, load_model
from mlx_fit.cli.preferences import as_text, describe_rewards, takes_pairs
from mlx_fit.cli.settings import toml_text
from mlx_fit.cli.text_data import check_data, find_file, require_part, train_and_valid
from mlx_fit.cli.training import (
    choose_what_trains,
    count_steps,
    describe_objective,
    describe_rows,
    held_out_batches,
    make_batches,
    make_objective,
    make_optimizer,
    make_router_loss,
)
from mlx_fit.distributed.trainer import DistributedTrainer
from mlx_fit.errors import ConfigurationError
from mlx_fit.history import History

RECORD = "finetune.toml"


def checkpoint_dir(settings: argparse.Namespace) -> Path:
    """The folder of the run's checkpoints."""
    given = settings.checkpoint_dir
    return Path(given or Path(settings.adapter_path) / "checkpoints").expanduser()


def check_new(settings: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, to start over where another run has been.

    Raises:
        ConfigurationError: the folder holds checkpoints, and ``--resume`` is not given.
    """
    folder = checkpoint_dir(settings)
    if not settings.resume and any(folder.glob("step-*")):
        raise ConfigurationError(
            f"{folder} holds the checkpoints of a run. --resume goes on with it; for a new one "
            "give another --adapter-path, or remove the folder."
        )


class FineTuning:
    """A run of ``mlx-fit finetune``: everything it needs, in the order it needs it.

    Args:
        settings: from :func:`~mlx_fit.cli.finetune_settings.read_settings`.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self._settings = settings
        check_data(settings.data)  # before a large model is loaded
        if settings.test and find_file(settings.data, "test") is None:
            raise ConfigurationError(f"--test: {settings.data} has no test.jsonl.")
        self._loaded: Loaded = load_model(settings)
        self._pairs = takes_pairs(settings)
        train, valid, self._rows = train_and_valid(settings, self._loaded.tokenizer, self._pairs)
        self._num_train = len(train)
        has_valid = valid is not None and len(valid)
        if settings.patience is not None and not has_valid:
            raise ConfigurationError("--patience needs validation data: valid.jsonl, or a split.")
        self._model = self._loaded.model
        choose_what_trains(self._model, settings)
        self._batches = make_batches(train, self._model, settings)
        self._valid = held_out_batches(valid, self._model, settings) if has_valid else None
        self._test_batches: Any = None
        if settings.test:  # now: the model as it begins may be the reference of pairs
            rows = require_part(settings, self._loaded.tokenizer, "test", self._pairs)
            self._test_batches = held_out_batches(rows, self._model, settings)
        self._epochs, self._steps = count_steps(settings, len(self._batches))
        self._router_loss = make_router_loss(self._model, settings)
        self._objective = make_objective(self._model, settings, self._router_loss)
        self._every = min(settings.eval_every, self._steps)
        self._trainer = DistributedTrainer(  # alone it is a Trainer
            self._model,
            make_optimizer(settings, self._steps),
            objective=self._objective,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            clip_norm=settings.clip_norm,
            seed=settings.seed,
        )
        self._is_first = self._trainer.rank == 0
        if settings.test and self._trainer.size > 1:
            raise ConfigurationError("--test is for one process: use mlx-fit evaluate afterwards.")
        self._directory = Path(settings.adapter_path).expanduser()
        self._best = BestAdapters(self._directory, settings.adapter_format)
        self._contexts = ExitStack()

    def __enter__(self) -> FineTuning:
        """Blocks are recomputed, embeddings noisy, routers listened to inside, where asked for."""
        if self._settings.checkpoint_layers:
            self._contexts.enter_context(finetune.checkpoint_layers(self._model))
        if self._settings.neftune is not None:
            self._contexts.enter_context(finetune.neftune(self._model, self._settings.neftune))
        if self._router_loss is not None:
            self._contexts.enter_context(self._router_loss)
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def print_plan(self) -> None:
        """What trains, what the data is, what memory a step takes, how long the run is.

        Of several ranks the first one prints, and none measures memory.
        """
        settings = self._settings
        if not self._is_first:
            return
        print(finetune.statistics(self._model, self._trainer.optimizer), end="\n\n")
        print(describe_rows(self._rows, settings), end="\n\n")
        if settings.plan and self._trainer.size == 1:
            print(self._trainer.plan(next(iter(self._batches))), end="\n\n")
        print(
            f"{self._num_train:,} rows in {len(self._batches):,} batches an epoch; {self._steps:,} "
            f"updates of {settings.gradient_accumulation} x {settings.batch_size} rows, "
            f"{self._epochs} epoch{'s' if self._epochs > 1 else ''}; "
            f"{describe_objective(self._model, settings)}."
        )
        if self._valid is None:
            print("No validation data: the last weights are kept, not the best.")
        else:
            print(f"{len(self._valid.lengths):,} rows for validation, every {self._every} updates.")
        sys.stdout.flush()

    def print_batch(self) -> None:
        """The first batch as text."""
        if not self._is_first:
            return
        batch, tokenizer = next(iter(self._batches)), self._loaded.tokenizer
        if self._pairs:
            print_batch(as_text(batch), tokenizer, ("chosen: ", "rejected: "))
        else:
            print_batch(batch, tokenizer)

    def train(self) -> History:
        """Fit, keep the best, and say what came of it.

        A run that SIGTERM ends raises :class:`~mlx_fit.Preempted`, with a checkpoint written.
        """
        settings, trainer = self._settings, self._trainer
        policy = CheckpointPolicy(
            f"{settings.checkpoint_every} steps",
            keep_last=settings.keep_checkpoints,
            frozen="expect",  # the frozen base is in the model's folder
        )
        history = trainer.fit(
            self._batches,
            self._valid,
            epochs=self._epochs,
            max_steps=self._steps,
            validation_freq=f"{self._every} steps" if self._valid is not None else 1,
            validation_steps=settings.eval_batches if self._valid is not None else None,
            callbacks=self._callbacks(),
            checkpoint_dir=checkpoint_dir(settings),
            checkpoint_every=policy,
            resume="auto" if settings.resume else False,
            log_every=settings.log_every,
        )
        if history.stopped_by == "SIGINT":
            print(f"Stopped after {trainer.step} updates; the same command with --resume goes on.")
            return history
        if self._valid is not None and trainer.step % self._every:
            found = trainer.evaluate(self._valid, steps=settings.eval_batches)
            if self._is_first:
                self._best.consider(found)
        if self._is_first:
            self._print_end(history)
        if settings.test:
            self._test()
        return history

    def _record(self) -> None:
        """Write down the settings, as ``--config`` reads them."""
        ignored = ("schedule", "warmup_steps") if self._settings.lr_schedule is not None else ()
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in vars(self._settings).items() if key not in ignored}
        (self._directory / RECORD).write_text(toml_text(kept), encoding="utf-8")

    def _callbacks(self) -> list[Callback]:
        recorder = LambdaCallback(on_train_begin=lambda logs: self._record())
        recorder.first_rank_only = True
        found: list[Callback] = [
            recorder,
            self._best,
            JSONLogger(self._directory / "log.jsonl"),
        ]
        if self._settings.patience is not None:
            found.append(EarlyStopping(MONITOR, patience=self._settings.patience))
        return found

    def _print_end(self, history: History) -> None:
        settings, best = self._settings, self._best
        ended = history.stopped_by not in (None, "max_steps")
        why = f" (stopped by {history.stopped_by})" if ended else ""
        print(f"\n{self._trainer.step} updates{why}.", end=" ")
        if best.best is not None:
            print(f"Best {MONITOR} {best.best:.4f} after {best.best_step} updates.")
        else:
            print(f"Kept after {best.best_step} updates.")
        where = shlex.join(["--model", settings.model, "--adapter-path", str(self._directory)])
        if settings.quantize is not None:
            where += f" --quantize {settings.quantize}"
            if settings.quantize_group_size != 64:
                where += f" --quantize-group-size {settings.quantize_group_size}"
        print(f"{self._directory} holds them. Next:")
        print(f"  mlx-fit generate {where} --prompt '...'")
        print(f"  mlx-fit fuse {where} --save-path fused")

    def _test(self) -> None:
        """Evaluate the best weights on the test rows."""
        finetune.load_adapters(self._model, self._directory)
        found = self._trainer.evaluate(self._test_batches, steps=self._settings.test_batches)
        if self._pairs:
            print(f"test: {describe_rewards(found)}")
            return
        print(
            f"test: loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}, "
            f"{found['num_tokens']:,.0f} tokens"
        )
