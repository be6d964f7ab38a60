"""Arguments by the names of Keras, Lightning and others: the error says which one is meant."""

import inspect

import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from toys import rows_of_ones, trainer_of

from mlx_fit import DistributedTrainer, Trainer, keywords

FIT = {
    "validation_data": "Here it is val=",
    "max_epochs": "Here it is epochs=",
    "num_epochs": "Here it is epochs=",
    "callback": "Here it is callbacks=",
    "lr": r"optim.Adam\(learning_rate=...\)",
    "batch_size": r"Give it to Trainer\(..., batch_size=...\)",
    "metrics": r"Give it to Trainer\(..., metrics=...\)",
    "criterion": r"Give it to Trainer\(..., loss=...\)",
    "y": r"in one tuple: fit\(\(x, y\)\)",
    "num_workers": r"DataLoader\(dataset, num_workers=...\)",
    "ckpt_path": "Here it is resume=",
    "epoches": "Perhaps epochs= is meant",
    "zzz": "Arguments are train, val, epochs, max_steps",
}
TRAINER = {
    "max_epochs": r"Give it to trainer.fit\(..., epochs=...\)",
    "callbacks": r"Give it to trainer.fit\(..., callbacks=...\)",
    "loss_fn": "Here it is loss=",
    "criterion": "Here it is loss=",
    "accumulate_grad_batches": "Here it is gradient_accumulation=",
    "gradient_clip_val": "Here it is clip_norm=",
    "learning_rate": r"optim.Adam\(learning_rate=...\)",
    "strategy": "DistributedTrainer",
}


@pytest.mark.parametrize(("given", "says"), FIT.items())
def test_an_unknown_keyword_of_fit_names_the_argument(given, says):
    with pytest.raises(
        TypeError, match=rf"Trainer.fit\(\) .* keyword argument '{given}'. .*{says}"
    ):
        trainer_of().fit(rows_of_ones(), **{given: 3})


@pytest.mark.parametrize(("given", "says"), TRAINER.items())
def test_an_unknown_keyword_of_the_trainer_names_the_argument(given, says):
    with pytest.raises(TypeError, match=rf"Trainer\(\) .* keyword argument '{given}'. .*{says}"):
        Trainer(nn.Linear(1, 1), optim.SGD(0.1), **{given: 3})


def test_all_unknown_keywords_are_named_at_once():
    with pytest.raises(TypeError, match="'x': here it is train=; 'y': give x and y in one tuple"):
        trainer_of().fit(x=1, y=2)


@pytest.mark.parametrize("method", ["evaluate", "predict", "predict_batches"])
def test_evaluation_and_prediction_say_it_too(method):
    with pytest.raises(TypeError, match=f"{method}.*'x'. Here it is data="):
        getattr(trainer_of(), method)(x=rows_of_ones())


def test_a_trainer_of_several_ranks_says_it_too():
    with pytest.raises(TypeError, match=r"'loss_fn'\. Here it is loss="):
        DistributedTrainer(nn.Linear(1, 1), optim.SGD(0.1), loss_fn="mse")


def arguments_of(function):
    return set(inspect.signature(function).parameters)


def test_the_signatures_are_seen_as_they_are_and_hold_what_the_tables_name():
    assert inspect.signature(Trainer.fit).parameters["epochs"].default == 1
    assert set(keywords._TAKEN_BY["trainer.fit"].split()) <= arguments_of(Trainer.fit)
    assert set(keywords._TAKEN_BY["Trainer"].split()) <= arguments_of(Trainer)
    everything = arguments_of(Trainer.fit) | arguments_of(Trainer) | arguments_of(Trainer.evaluate)
    assert set(keywords._MEANT) <= everything
    assert not set(keywords._ELSEWHERE) & everything
