"""LoggerCallback with a logger of the user's own: what it is told, and when."""

import warnings

import pytest
from toys import Do, raising, ramp, rows_of_ones, trainer_of

from mlx_fit import ConfigurationError, GradientMonitor, LoggerCallback
from mlx_fit.loggers import Logger, ResumableLogger


class Notes:
    """A logger of three methods."""

    def __init__(self):
        self.told = []

    def log_config(self, config):
        self.told.append(("config", config))

    def log_scalars(self, values, step):
        self.told.append((step, values))

    def close(self, error=None):
        self.told.append(("close", error))

    @property
    def rows(self):
        return [(step, values) for step, values in self.told if isinstance(step, int)]


class Kept(Notes):
    """One whose runs have names."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def state_dict(self):
        return {"name": self.name}

    def load_state_dict(self, state):
        self.name = state["name"]


def told_of(data, val=None, logger=None, more=(), **options):
    logger = logger or Notes()
    every = options.pop("every", "epoch")
    callbacks = [*more, LoggerCallback(logger, every)]
    trainer_of(learning_rate=0.0).fit(data, val, callbacks=callbacks, verbose=0, **options)
    return logger


def test_the_protocols_tell_who_can_go_on():
    assert isinstance(Notes(), Logger)
    assert not isinstance(Notes(), ResumableLogger)
    assert isinstance(Kept("a"), ResumableLogger)


def test_config_comes_first_and_close_last():
    told = told_of(ramp(2), epochs=2).told
    assert told[0][0] == "config"
    assert told[0][1]["loss"] == "mse"
    assert told[-1] == ("close", None)
    assert [kind for kind, _ in told] == ["config", 2, 4, "close"]


def test_an_epoch_is_sent_by_its_step_and_evaluations_once():
    rows = told_of(ramp(4), ramp(2), epochs=1).rows
    assert rows == [
        (4, {"val_loss": 8.0, "val_mae": 2.0}),
        (4, {"epoch": 0.0, "loss": 56.0, "mae": 6.0, "learning_rate": 0.0}),
    ]


def test_evaluations_inside_epochs_stand_at_their_own_steps():
    rows = told_of(ramp(4), ramp(2), validation_freq="2 steps").rows
    assert [step for step, values in rows if "val_loss" in values] == [2, 4]


def test_batches_are_sent_every_so_many_steps_as_running_means():
    rows = told_of(ramp(4), every=2).rows
    assert rows[:2] == [
        (2, {"batch_loss": 8.0, "batch_mae": 2.0}),
        (4, {"batch_loss": 56.0, "batch_mae": 6.0}),
    ]


def test_with_accumulation_every_counts_updates():
    logger = Notes()
    trainer = trainer_of(learning_rate=0.0, gradient_accumulation=2)
    trainer.fit(ramp(8), callbacks=LoggerCallback(logger, 2), verbose=0)
    assert [step for step, values in logger.rows if "batch_loss" in values] == [2, 4]


def test_by_epoch_a_batch_costs_no_hook():
    assert "on_train_batch_end" not in vars(LoggerCallback(Notes()))
    assert LoggerCallback.on_train_batch_end is LoggerCallback.__mro__[1].on_train_batch_end


def test_norms_by_layer_have_names():
    ((_, values),) = told_of(rows_of_ones(4), more=[GradientMonitor()]).rows
    assert any(key.startswith("layer_grad_norms/") for key in values)


def test_more_config_is_told():
    logger = Notes()
    callback = LoggerCallback(logger, config={"width": 8})
    trainer_of().fit(ramp(1), callbacks=callback, verbose=0)
    assert logger.told[0][1]["config"] == {"width": 8}


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_an_error_closes_the_run_with_it(error):
    logger = Notes()
    with pytest.raises(type(error)):
        told_of(ramp(2), logger=logger, epochs=2, more=[Do("on_epoch_end", raising(error), 1)])
    assert logger.told[-1] == ("close", error)


def test_a_logger_that_fails_is_one_warning_and_training_goes_on():
    class Broken(Notes):
        def log_scalars(self, values, step):
            raise ConnectionError("gone")

        def close(self, error=None):
            raise ConnectionError("gone as well")

    with pytest.warns(UserWarning, match="Broken failed: ConnectionError.'gone'") as caught:
        told_of(ramp(2), logger=Broken(), epochs=3)
    assert len(caught) == 1


def test_a_logger_that_cannot_start_raises():
    class Closed(Notes):
        def log_config(self, config):
            raise PermissionError("no key")

    with pytest.raises(PermissionError, match="no key"):
        told_of(ramp(1), logger=Closed())


def test_a_resumed_run_goes_on_with_the_loggers_run(tmp_path):
    first, second = Kept("first"), Kept("second")
    options = {"checkpoint_dir": tmp_path, "resume": "auto", "epochs": 2}
    told_of(ramp(2), logger=first, **options)
    told_of(ramp(2), logger=second, **(options | {"epochs": 3}))
    assert second.name == "first"
    assert [step for step, _ in second.rows] == [6]


def test_a_logger_without_a_state_is_resumed_as_well(tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": "auto"}
    told_of(ramp(2), **options)
    assert [step for step, _ in told_of(ramp(2), epochs=2, **options).rows] == [4]


def test_a_second_fit_is_told_again():
    logger = Notes()
    for _ in range(2):
        told_of(ramp(1), logger=logger)
    assert [kind for kind, _ in logger.told] == ["config", 1, "close"] * 2


@pytest.mark.parametrize("wrong", [None, "wandb", Notes, object()])
def test_what_is_no_logger_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="LoggerCallback: logger="):
        LoggerCallback(wrong)


@pytest.mark.parametrize("wrong", [0, -1, "batch", 1.5, True])
def test_a_wrong_frequency_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="LoggerCallback: every="):
        LoggerCallback(Notes(), wrong)


def test_it_changes_no_bit():
    watched, plain = trainer_of(), trainer_of()
    watched.fit(ramp(3), callbacks=LoggerCallback(Notes(), 1), verbose=0)
    with warnings.catch_warnings():
        plain.fit(ramp(3), verbose=0)
    assert watched.model.weight.tolist() == plain.model.weight.tolist()
