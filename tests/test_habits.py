"""Code as for PyTorch, in a loss or an objective: the error says what MLX has instead."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from toys import ramp, trainer_of

from mlx_fit.habits import explain


def notes_of(**options):
    trainer = trainer_of(metrics=[], **options)
    with pytest.raises(AttributeError) as caught:
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
    ],
)
def test_a_loss_written_as_for_torch_is_explained(written, says):
    def loss(outputs, targets):
        value = mx.square(outputs - targets).mean()
        written(value)
        return value

    assert says in notes_of(loss=loss)


def test_an_objective_is_explained_as_well():
    def objective(model, batch):
        model.zero_grad()

    assert "MLX has no .zero_grad: return the loss" in notes_of(objective=objective, loss=None)


class Own:
    """An object of the user's own, without ``backward``."""


@pytest.mark.parametrize("what", [lambda: Own().backward, lambda: mx.array(1).nothing])
def test_other_errors_are_left_alone(what):
    with pytest.raises(AttributeError) as caught:
        what()
    explain(caught.value)
    explain(ValueError("backward"))
    assert not hasattr(caught.value, "__notes__")
