"""Arguments by the names that Keras, Lightning and others have for them: which are meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The argument here -> other libraries' names for it.
_MEANT = {
    "val": (
        "validation_data validation_set valid_data val_data val_dataset valid eval_dataset "
        "eval_set eval_data val_loader valid_loader val_dataloader val_dataloaders "
        "validation_dataset validation eval_dataloader"
    ),
    "train": (
        "train_data train_dataset training_data train_loader train_dataloader train_dataloaders "
        "dataset dataloader loader datamodule x X"
    ),
    "data": "x test_data dataloaders dataloader dataset datamodule loader",
    "epochs": "max_epochs num_epochs n_epochs nb_epoch nb_epochs epoch num_train_epochs",
    "max_steps": "steps num_steps total_steps max_iters iters num_iters",
    "callbacks": "callback logger loggers early_stopping",
    "loss": "loss_fn criterion loss_function compute_loss loss_func",
    "metrics": "metric compute_metrics weighted_metrics",
    "optimizer": "optimizers optim",
    "gradient_accumulation": (
        "accumulate_grad_batches gradient_accumulation_steps accumulation_steps "
        "grad_accumulation accumulate grad_accum_steps"
    ),
    "clip_norm": (
        "gradient_clip_val max_grad_norm grad_clip clipnorm clip_grad_norm grad_clip_norm "
        "global_clipnorm"
    ),
    "clip_value": "clipvalue clip_grad_value",
    "batch_size": "train_batch_size per_device_train_batch_size bs",
    "checkpoint_dir": "default_root_dir output_dir save_dir",
    "checkpoint_every": "save_every save_steps save_freq",
    "resume": "ckpt_path resume_from_checkpoint resume_from",
    "validation_freq": "check_val_every_n_epoch val_check_interval eval_steps",
    "log_every": "log_every_n_steps logging_steps",
    "verbose": "enable_progress_bar progress_bar progbar",
    "class_weight": "class_weights",
    "seed": "random_state random_seed",
    "compile": "jit_compile jit",
    "device_config": "device devices accelerator",
    "precision": "dtype fp16 bf16 mixed_precision amp",
}
# Where to give what another function takes.
_TAKEN_BY = {
    "Trainer": (
        "loss metrics optimizer gradient_accumulation clip_norm clip_value batch_size seed "
        "compile device_config precision objective on_oom nonfinite model"
    ),
    "trainer.fit": (
        "train val epochs max_steps steps_per_epoch initial_epoch callbacks checkpoint_dir "
        "checkpoint_every resume validation_freq log_every verbose class_weight "
        "validation_split validation_steps shuffle"
    ),
}
# What is no argument of any of them.
_ELSEWHERE = {
    "y": "Give x and y in one tuple: fit((x, y)), evaluate((x, y))",
    "sample_weight": "Give the weights with the rows: (x, y, weights)",
    "validation_batch_size": "Give a DataLoader of that batch_size as val",
    "num_workers": "Give a DataLoader(dataset, num_workers=...)",
    "workers": "Give a DataLoader(dataset, num_workers=...)",
    "use_multiprocessing": "Give a DataLoader(dataset, num_workers=...)",
    "collate_fn": "Give a DataLoader(dataset, collate_fn=...)",
    "lr": "It is the optimizer's: optim.Adam(learning_rate=...)",
    "learning_rate": "It is the optimizer's: optim.Adam(learning_rate=...)",
    "weight_decay": "It is the optimizer's: optim.AdamW(1e-3, weight_decay=...)",
    "scheduler": "Give a schedule to the optimizer as its learning_rate",
    "lr_scheduler": "Give a schedule to the optimizer as its learning_rate",
    "strategy": "Use DistributedTrainer(..., strategy=...)",
    "num_nodes": "Use DistributedTrainer, and mlx-fit launch",
    "run_eagerly": "Use Trainer(..., compile=False)",
    "fast_dev_run": "Use trainer.fit(..., max_steps=...)",
    "return_dict": "Leave it out: a dict is returned",
}


def known_only(function: Callable[P, R]) -> Callable[P, R]:
    """A function that says of an unknown keyword which argument is meant.

    Raises:
        TypeError: as Python does.

    Example:
        >>> @known_only
        ... def fit(train, val=None):
        ...     pass
        >>> fit([], validation_data=[])
        Traceback (most recent call last):
        TypeError: fit() got an unexpected keyword argument 'validation_data'. Here it is val=.
    """
    code = function.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    name = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = [given for given in kwargs if given not in known]
        if unknown:
            raise TypeError(f"{name}() got {_described(unknown, known)}")
        return function(*args, **kwargs)

    return checked


def _described(unknown: list[str], known: tuple[str, ...]) -> str:
    """What was given and what is meant, all of it at once."""
    advice = [_advice(given, known) for given in unknown]
    if len(unknown) == 1:
        return f"an unexpected keyword argument {unknown[0]!r}. {advice[0]}."
    pairs = zip(unknown, advice, strict=True)
    told = [f"{given!r}: {text[0].lower()}{text[1:]}" for given, text in pairs]
    return f"unexpected keyword arguments. {'; '.join(told)}."


def _advice(given: str, known: tuple[str, ...]) -> str:
    """Which argument is meant, or what there is."""
    meant = [here for here, names in _MEANT.items() if given in (here, *names.split())]
    for here in meant:
        if here in known:
            return f"Here it is {here}="
    for here in meant or [given]:
        for function, arguments in _TAKEN_BY.items():
            if here in arguments.split():
                return f"Give it to {function}(..., {here}=...)"
    if given in _ELSEWHERE:
        return _ELSEWHERE[given]
    close = difflib.get_close_matches(given, known, 1)
    if close:
        return f"Perhaps {close[0]}= is meant. Arguments are {', '.join(known[1:])}"
    return f"Arguments are {', '.join(known[1:])}"
