"""Code as for PyTorch, in a loss or an objective: the error says what MLX has instead."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import ramp, trainer_of

from mlx_fit import Trainer
from mlx_fit.errors import DataError
from mlx_fit.habits import REPLACED, explain


def notes_of(**options):
    trainer = trainer_of(metrics=[], **options)
    with pytest.raises((AttributeError, TypeError, ValueError)) as caught:
        trainer.fit(ramp(1), verbose=0)
    return " ".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (lambda loss: loss.backward(), "MLX has no .backward: return the loss"),
        (lambda loss: loss.detach(), "MLX has no .detach: use mx.stop_gradient"),
        (lambda loss: loss.cuda(), "MLX has no .cuda: leave it out"),
        (lambda loss: loss.numpy(), "MLX has no .numpy: leave values as arrays"),
        (lambda loss: nn.Linear(1, 1).cuda(), "MLX has no .cuda"),
        (lambda loss: nn.Linear(1, 1).load_state_dict({}), "load_weights(model, source)"),
        (lambda loss: loss.add_(1), "no operations in place: write x = mx.add(...)"),
        (lambda loss: loss.mul_(1), "write x = mx.multiply(...)"),
        (lambda loss: loss.view(-1), "Use x.reshape(...)"),
        (lambda loss: loss.size(0), "use x.shape"),
        (lambda loss: loss.sum(dim=0), "dim= is axis="),
        (lambda loss: loss.sum(axis=0, keepdim=True), "keepdim= is keepdims="),
        (lambda loss: loss.item(), "A step is compiled"),
        (lambda loss: float(loss), "A step is compiled"),
        (lambda loss: optim.SGD(0.1).step(), "the trainer updates the weights"),
        (lambda loss: pytest.importorskip("torch").relu(loss), "Torch's functions take no MLX"),
    ],
)
def test_a_loss_written_as_for_torch_is_explained(written, says):
    def loss(outputs, targets):
        value = mx.square(outputs - targets).mean()
        written(value)
        return value

    assert says in notes_of(loss=loss)


def test_a_batch_of_one_row_has_no_variance():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3))
    trainer = Trainer(model, optim.SGD(0.1), "mse", batch_size=4)
    x = np.ones((5, 4), np.float32)
    with pytest.raises(DataError, match=r"the batch has one row. Use another batch_size") as caught:
        trainer.fit((x, x[:, :3]), verbose=0)
    assert "x: (1, 4) float32" in " ".join(caught.value.__notes__)
    assert "more than one value per channel" in str(caught.value.__cause__)


def test_an_objective_is_explained_as_well():
    def objective(model, batch):
        model.zero_grad()

    assert "MLX has no .zero_grad: return the loss" in notes_of(objective=objective, loss=None)


def test_what_is_said_to_be_missing_is_missing():
    assert [name for name in REPLACED if hasattr(mx.array(1.0), name)] == []


class Own:
    """An object of the user's own, without ``backward``."""


@pytest.mark.parametrize("what", [lambda: Own().backward, lambda: mx.array(1).nothing])
def test_other_errors_are_left_alone(what):
    with pytest.raises(AttributeError) as caught:
        what()
    explain(caught.value)
    explain(ValueError("backward"))
    assert not hasattr(caught.value, "__notes__")
