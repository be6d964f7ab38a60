"""TerminateOnNaN; how fit ends by it is in test_fit.py."""

import math

import pytest
from toys import batch_of, trainer_of

from mlx_fit import ConfigurationError, EarlyStopping, TerminateOnNaN


def test_it_stops_right_after_the_bad_step():
    trainer = trainer_of()
    data = [*[batch_of(1)] * 3, batch_of(math.nan), *[batch_of(1)] * 20]
    trainer.fit(data, callbacks=TerminateOnNaN(), log_every=100, verbose=0)
    assert trainer.step == 4


def test_good_losses_run_to_the_end():
    history = trainer_of().fit([batch_of(1)] * 3, epochs=2, callbacks=TerminateOnNaN(), verbose=0)
    assert history.stopped_by is None
    assert history.epoch == [0, 1]


@pytest.mark.parametrize("policy", ["ignore", "skip"])
def test_where_non_finite_losses_are_allowed_it_is_refused(policy):
    with pytest.raises(ConfigurationError, match="nonfinite"):
        trainer_of(nonfinite=policy).fit([batch_of(1)], callbacks=TerminateOnNaN(), verbose=0)


def test_the_best_weights_come_back():
    trainer = trainer_of()
    stopping = EarlyStopping("loss", patience=9, restore_best_weights=True)
    data = iter([batch_of(1), batch_of(1), batch_of(math.nan), batch_of(1)])
    options = {"steps_per_epoch": 1, "epochs": 4, "verbose": 0}
    trainer.fit(data, callbacks=[TerminateOnNaN(), stopping], **options)
    assert stopping.best_epoch == 1
    assert math.isfinite(trainer.model.weight.sum().item())
