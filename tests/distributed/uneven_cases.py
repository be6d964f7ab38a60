"""What ranks do in the tests of ranks that have nothing. Run as a script in each of them."""

from __future__ import annotations

import warnings

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from rank_cases import RANK, case, error_of, fitted, main, own_batches, rows, trainer_of

from mlx_fit import DataLoader


def forms(batches):
    """The same batches as a list, an iterator and a function."""
    return {"list": batches, "iterator": iter(batches), "function": lambda: iter(batches)}


@case
def trained_by_rank_0(folder):
    """Rank 1 has no batch at all; by the form of the data."""
    found = {}
    for form, data in forms(own_batches((5, 0))).items():
        trainer = trainer_of(optimizer=optim.AdamW(0.01))
        found[form] = fitted(trainer, data, epochs=1 if form == "iterator" else 2)
    return found


@case
def trained_by_rank_1(folder):
    trainer = trainer_of(gradient_accumulation=2, clip_norm=0.5)
    return fitted(trainer, own_batches((0, 5)), epochs=2)


@case
def epochs_of_steps_of_rank_1(folder):
    """Passes of 3 batches, joined to epochs of 4."""
    found = {}
    for form, data in forms(own_batches((0, 3))).items():
        options = {"epochs": 1, "steps_per_epoch": 3} if form == "iterator" else {"epochs": 2}
        found[form] = fitted(trainer_of(), data, **{"steps_per_epoch": 4} | options)
    return found


@case
def epochs_of_steps_of_iterators(folder):
    """Rank 1 runs out in the first of the epochs; rank 0 has enough for two, not for three."""
    batches = own_batches((4, 1))
    found = fitted(trainer_of(), iter(batches), epochs=2, steps_per_epoch=2)
    error = error_of(lambda: fitted(trainer_of(), iter(batches), epochs=3, steps_per_epoch=2))
    return found | {"error": error}


@case
def validated_by_rank_0(folder):
    found = {}
    for form, val in forms(own_batches((3, 0))).items():
        found[form] = fitted(trainer_of(), own_batches((2, 3)), val=val, epochs=2)["history"]
    return found


@case
def evaluated_by_rank_1(folder):
    found = {}
    trainer = trainer_of(metrics=("accuracy", "auroc"))
    for form, data in forms(own_batches((0, 3))).items():
        found[form] = {"values": trainer.evaluate(data, verbose=0)}
    for form, data in forms(own_batches((0, 3))).items():
        found[form]["outputs"] = trainer.predict(data, verbose=0).tolist()
    return found


@case
def several_sets(folder):
    """Validation sets of which each rank has one; and no rank has both kinds of data."""
    sets = {"a": own_batches((1, 0)), "b": own_batches((0, 2))}
    found = fitted(trainer_of(), own_batches((2, 1)), val=sets, epochs=1)["history"]
    both = fitted(trainer_of(), own_batches((2, 0)), val=own_batches((1, 0)), epochs=1)["history"]
    return [found, both]


@case
def single_batches(folder):
    """One batch at a time, of which rank 1 has no row."""
    (x, y), count = rows(6), 0 if RANK else 6
    trainer = trainer_of()
    return [
        trainer.train_on_batch(x[:count], y[:count]),
        trainer.train_on_batch(x[:count], y[:count]),
        trainer.test_on_batch(x[:count], y[:count]),
    ]


@case
def nothing_anywhere(folder):
    def errors(make):
        return [
            error_of(lambda: fitted(trainer_of(), make())),
            error_of(lambda: fitted(trainer_of(), make(), steps_per_epoch=2)),
            error_of(lambda: fitted(trainer_of(), own_batches((2, 2)), val=make())),
            error_of(lambda: trainer_of().evaluate(make(), verbose=0)),
            error_of(lambda: trainer_of().predict(make(), verbose=0)),
        ]

    makes = {
        "list": list,
        "iterator": lambda: iter([]),
        "function": lambda: lambda: iter([]),
        "arrays": lambda: (np.zeros((0, 8), np.float32), np.zeros(0, np.int64)),
    }
    found = {form: errors(make) for form, make in makes.items()}
    return found | {"after": fitted(trainer_of(), rows(24), epochs=1)["history"]}


@case
def other_kinds(folder):
    """What ranks must not mix."""
    whole = rows(24)
    return {
        "array": error_of(lambda: fitted(trainer_of(), rows(24 * RANK))),
        "loader": error_of(lambda: fitted(trainer_of(), DataLoader(rows(24 - 24 * RANK), 8))),
        "mixed": error_of(lambda: fitted(trainer_of(), [] if RANK else whole)),
        "val": error_of(lambda: fitted(trainer_of(), whole, val=None if RANK else whole)),
        "stop": error_of(lambda: fitted(trainer_of(uneven="stop"), own_batches((2, 0)))),
        "stop late": error_of(
            lambda: fitted(trainer_of(uneven="stop"), lambda: iter(own_batches((2, 0))))
        ),
    }


@case
def one_row_through_batch_norm(folder):
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm(4))
    return error_of(lambda: fitted(trainer_of(model, batch_size=3), rows(3)))


@case
def resumed(folder):
    """Stopped after some steps and gone on with, where the ranks have 5 and 2 batches."""
    found = {}
    for form in ("list", "function"):
        for steps, options in ((4, {}), (9, {"steps_per_epoch": 6})):
            runs = []
            for max_steps in ((12,), (steps, 12)):
                folder_of_run = folder / f"{form} {steps} {len(max_steps)}"
                for last in max_steps:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # batches that are read and discarded
                        run = fitted(
                            trainer_of(optimizer=optim.AdamW(0.01)),
                            forms(own_batches((5, 2)))[form],
                            epochs=9,
                            max_steps=last,
                            checkpoint_dir=folder_of_run,
                            resume="auto",
                            **options,
                        )
                runs.append(run)
            found[f"{form} {steps}"] = [{k: run[k] for k in ("weights", "step")} for run in runs]
    return found


if __name__ == "__main__":
    main()
