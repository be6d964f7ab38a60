"""Modules with steps of their own, against the same model in a plain trainer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from toys import Do, raising, ramp, trainer_of

from mlx_fit import Trainer
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.lightning import LightningModule, lightning_trainer, loaders


class Classifier(LightningModule):
    def __init__(self, optimizer=None):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.given = optimizer

    def forward(self, x):
        return self.fc(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)
        loss = nn.losses.cross_entropy(outputs, y, reduction="mean")
        self.log("train_acc", (outputs.argmax(-1) == y).mean())
        return {"loss": loss}

    def validation_step(self, batch):
        x, y = batch
        outputs = self(x)
        self.log_dict(
            {
                "val_loss": nn.losses.cross_entropy(outputs, y, reduction="mean"),
                "val_acc": (outputs.argmax(-1) == y).mean(),
            }
        )

    def configure_optimizers(self):
        return optim.SGD(0.1) if self.given is None else self.given


@pytest.fixture
def data(rng):
    return rng.normal(size=(20, 4)).astype("f"), rng.integers(0, 3, 20)


def test_a_module_trains_as_the_plain_model_does(data):
    module, model = Classifier(), nn.Linear(4, 3)
    model.update(module.fc.parameters())
    options = {"epochs": 3, "shuffle": False, "verbose": 0}
    got = lightning_trainer(module, batch_size=8).fit(data, data, **options)
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy", ["accuracy"], batch_size=8)
    expected = trainer.fit(data, data, **options)
    for key, name in (
        *(("loss", "loss"), ("train_acc", "accuracy")),
        *(("val_loss", "val_loss"), ("val_acc", "val_accuracy")),
    ):
        np.testing.assert_allclose(got.history[key], expected.history[name], rtol=1e-5)
    assert mx.array_equal(module.fc.weight, model.weight)


def test_forward_is_what_predict_gives(data):
    module = Classifier()
    np.testing.assert_allclose(
        lightning_trainer(module).predict(data[0], verbose=0),
        np.array(module.fc(mx.array(data[0]))),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "wrap", [lambda o: o, lambda o: [o], lambda o: ([o], []), lambda o: {"optimizer": o}]
)
def test_an_optimizer_comes_in_lightnings_wrappings(wrap):
    optimizer = optim.SGD(0.1)
    assert lightning_trainer(Classifier(wrap(optimizer))).optimizer is optimizer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([optim.SGD(0.1), optim.SGD(0.1)], "2 optimizers.*param_groups"),
        (([optim.SGD(0.1)], ["cosine"]), "schedules.warmup_cosine"),
        ({"optimizer": optim.SGD(0.1), "lr_scheduler": 1}, r"\['lr_scheduler'\]"),
        ("adam", "a str; expected an MLX optimizer"),
    ],
)
def test_what_an_optimizer_cannot_be_is_told(given, message):
    with pytest.raises(ConfigurationError, match=message):
        lightning_trainer(Classifier(given))


def test_validation_without_a_step_of_its_own_takes_that_of_training(data):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return nn.losses.cross_entropy(self.fc(batch[0]), batch[1], reduction="mean")

        def configure_optimizers(self):
            return optim.SGD(0.1)

    history = lightning_trainer(Plain()).fit(data, data, verbose=0)
    assert set(history.history) == {"loss", "val_loss", "learning_rate"}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda self, batch: self.fc(batch[0]).mean().backward(), r"\.backward.*return the loss"),
        (lambda self, batch: self.fc(batch[0].cuda()).mean(), r"\.cuda.*unified memory"),
        (lambda self, batch: self.fc(batch[0]).detach().mean(), "stop_gradient"),
        (lambda self, batch: None, "returned no loss. Return it"),
        (lambda self, batch: self.log("a", 1, on_step=True), "on_step=True.*leave the options out"),
        (lambda self, batch: self.log("a", 1, batch_size=3), "batch_size=3.*leave the options"),
    ],
)
def test_habits_without_counterpart_are_named_with_their_replacement(step, message, data):
    class Module(Classifier):
        training_step = step

    with pytest.raises(ConfigurationError, match=message):
        lightning_trainer(Module()).fit(data, verbose=0)


def test_options_of_log_that_ask_for_what_happens_are_taken(data):
    class Module(Classifier):
        def training_step(self, batch):
            self.log_dict({"one": 1.0, "two": 2.0}, prog_bar=True, on_epoch=True, on_step=False)
            return super().training_step(batch, None)

    history = lightning_trainer(Module()).fit(data, verbose=0)
    assert history.history["two"] == [2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_step", "evaluate"),
        ("predict_step", "forward"),
        ("on_train_epoch_end", "callback"),
        ("on_validation_epoch_end", "callback"),
        ("configure_gradient_clipping", "clip_norm="),
        ("train_dataloader", "give its data to fit"),
    ],
)
def test_what_would_never_be_called_is_named_with_its_replacement(name, message):
    kind = type("Module", (Classifier,), {name: lambda self, *args: None})
    with pytest.raises(ConfigurationError, match=f"Module.{name} would never be called.*{message}"):
        lightning_trainer(kind())


def test_a_test_step_that_is_that_of_validation_is_called(data):
    kind = type("Module", (Classifier,), {"test_step": Classifier.validation_step})
    assert "loss" in lightning_trainer(kind()).evaluate(data, verbose=0)


def test_an_update_by_hand_is_refused():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic_optimization is False"):
        lightning_trainer(module)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("save_hyperparameters", "set what you need as attributes"),
        ("hparams", "set what you need as attributes"),
        ("trainer", "lightning_trainer"),
        ("current_epoch", "write a callback"),
        ("global_step", "write a callback"),
        ("logger", "TensorBoard"),
    ],
)
def test_what_lightning_gives_a_module_is_named_with_its_replacement(name, says):
    with pytest.raises(AttributeError, match=rf"Classifier has no \.{name} as in.*{says}"):
        getattr(Classifier(), name)
    own = Classifier()
    setattr(own, name, 3)  # one's own is one's own
    assert getattr(own, name) == 3


def test_an_attribute_that_nobody_has_is_missing_as_ever():
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = Classifier().colour


def test_logging_outside_of_a_step_is_told():
    with pytest.raises(ConfigurationError, match="outside of a step"):
        Classifier().log("a", 1)


def test_a_module_that_is_none_is_told():
    with pytest.raises(ConfigurationError, match="module is a Linear"):
        lightning_trainer(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match=r"\['loss'\] come from the module"):
        lightning_trainer(Classifier(), loss="mse")


class DataModule:
    def __init__(self, data, num_val=1):
        self.calls = []
        self.data = data
        self.num_val = num_val

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def train_dataloader(self):
        return [self.data]

    def val_dataloader(self):
        return [[self.data]] * self.num_val


@pytest.mark.parametrize(("num_val", "keys"), [(0, []), (1, ["val_loss"]), (2, ["val_0_loss"])])
def test_a_data_module_gives_its_loaders(num_val, keys, data):
    module = DataModule(data, num_val)
    train, val = loaders(module)
    assert module.calls == ["prepare", "fit"]
    history = lightning_trainer(Classifier()).fit(train, val, verbose=0)
    assert set(keys) <= set(history.history)
    assert any(key.startswith("val") for key in history.history) == (num_val > 0)


def test_a_data_module_goes_into_fit_as_it_is(data):
    module = DataModule(data)
    found = lightning_trainer(Classifier()).fit(module, epochs=2, verbose=0).history
    assert module.calls == ["prepare", "fit"]
    assert len(found["val_loss"]) == 2
    given = lightning_trainer(Classifier()).fit(module, {"a": [data], "b": module}, verbose=0)
    assert {"val_a_loss", "val_b_loss"} <= set(given.history)
    assert module.calls[-2:] == ["prepare", "validate"]


def test_a_data_module_is_evaluated_and_predicted_from(data):
    class Module(DataModule):
        def test_dataloader(self):
            return [[data, data]]

    trainer = lightning_trainer(Classifier())
    module = Module(data)
    assert trainer.evaluate(module, verbose=0) == trainer.evaluate([data, data], verbose=0)
    # There is no predict_dataloader: validation's loader.
    np.testing.assert_array_equal(trainer.predict(module, verbose=0), trainer.predict([data]))
    assert module.calls == ["prepare", "test", "prepare", "predict"]


def test_what_makes_no_loader_is_told(data):
    with pytest.raises(DataError, match=r"no train_dataloader\(\)"):
        loaders([data])
    with pytest.raises(DataError, match="DataModule gives no loader to test with"):
        lightning_trainer(Classifier()).evaluate(DataModule(data, num_val=0))
    with pytest.raises(DataError, match="gives 2 loaders; evaluate them one by one"):
        lightning_trainer(Classifier()).evaluate(DataModule(data, num_val=2))


class Torn:
    """A data module that writes down what is called."""

    def __init__(self):
        self.called = []

    def setup(self, stage):
        self.called.append(("setup", stage))

    def teardown(self, stage):
        self.called.append(("teardown", stage))

    def train_dataloader(self):
        return ramp(2)

    def val_dataloader(self):
        return ramp(1)


def test_a_data_module_is_told_that_its_stage_is_over():
    data, trainer = Torn(), trainer_of()
    trainer.fit(data, verbose=0)
    trainer.evaluate(data, verbose=0)
    trainer.predict(data, verbose=0)
    stages = ("fit", "test", "predict")
    assert data.called == [(what, stage) for stage in stages for what in ("setup", "teardown")]


def test_a_data_module_is_told_after_an_error_as_well():
    data = Torn()
    with pytest.raises(KeyError):
        trainer_of().fit(data, callbacks=Do("on_epoch_end", raising(KeyError("x"))), verbose=0)
    assert data.called[-1] == ("teardown", "fit")
