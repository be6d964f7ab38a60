"""The list of callbacks, and what it makes of what users pass."""

import mlx.core as mx
import numpy as np
import pytest
from toys import Do, Recorder, raising, ramp, trainer_of

from mlx_fit import Callback, ConfigurationError, EarlyStopping, LambdaCallback
from mlx_fit.callbacks.base import CallbackList, numbers


def test_only_overridden_hooks_are_bound():
    class One(Callback):
        def on_epoch_end(self, epoch, logs=None):
            """Keras's signature works too."""

    callbacks = CallbackList([One(), One(), Recorder()], trainer_of(), {})
    assert len(callbacks.bound("on_epoch_end")) == 3
    assert len(callbacks.bound("on_train_batch_end")) == 1


def test_callbacks_know_run_model_and_params():
    seen, trainer = {}, trainer_of()

    class Look(Callback):
        def on_train_begin(self, logs):
            seen.update(run=self.trainer, model=self.model, params=self.params)

    trainer.fit(ramp(), epochs=2, callbacks=Look(), verbose=0)
    assert seen == {
        "run": trainer,
        "model": trainer.model,
        "params": {"verbose": 0, "epochs": 2, "steps": 4},
    }


def test_a_misspelt_hook_is_warned_of():
    class Typo(Callback):
        def on_epoch_ends(self, epoch, logs):
            pass

    with pytest.warns(UserWarning, match="Typo has on_epoch_ends, which no run calls"):
        trainer_of().fit(ramp(), callbacks=Typo(), verbose=0)


def test_something_that_is_no_callback_is_refused():
    for wrong in (print, Callback, {"a": Recorder()}, "early stopping"):
        with pytest.raises(ConfigurationError, match="expected Callback objects"):
            CallbackList([wrong], trainer_of(), {})


def test_one_object_twice_is_refused_and_an_iterable_is_a_list():
    stops = EarlyStopping("loss")
    with pytest.raises(ConfigurationError, match="one EarlyStopping object twice"):
        trainer_of().fit(ramp(1), callbacks=[stops, [stops]], verbose=0)
    heard = Recorder()
    trainer_of().fit(ramp(1), callbacks=(c for c in [heard, EarlyStopping("loss")]), verbose=0)
    assert heard.names[0] == "train_begin"


def test_a_failing_on_exception_hides_neither_the_error_nor_the_other_callbacks():
    error, after = RuntimeError("first"), Recorder()
    callbacks = [
        Do("on_epoch_end", raising(error)),
        Do("on_exception", raising(KeyError("second"))),
        after,
    ]
    with pytest.raises(RuntimeError, match="first") as caught:
        trainer_of().fit(ramp(), callbacks=callbacks, verbose=0)
    assert after.names[-1] == "exception"
    assert "second" in caught.value.__notes__[-1]


def test_numbers_are_told_from_matrices_and_texts():
    logs = {
        "float": 1.5,
        "int": 2,
        "numpy": np.float32(3),
        "array": np.array(4),
        "mlx": mx.array(5.0),
        "matrix": [[1, 2]],
        "vector": np.ones(1),
        "text": "6",
    }
    found = numbers(logs)
    assert found == {"float": 1.5, "int": 2, "numpy": 3, "array": 4, "mlx": 5}
    assert {type(value) for value in found.values()} == {float}


# --- LambdaCallback ------------------------------------------------------------------------------


def test_every_hook_can_be_a_function():
    seen = []
    hooks = ["train", "test", "predict"]
    callback = LambdaCallback(
        **{f"on_{kind}_begin": lambda logs, kind=kind: seen.append(kind) for kind in hooks}
    )
    trainer = trainer_of()
    trainer.fit(ramp(), ramp(), callbacks=callback, verbose=0)
    trainer.evaluate(ramp(), callbacks=callback, verbose=0)
    trainer.predict(ramp(), callbacks=callback, verbose=0)
    assert seen == ["train", "test", "test", "predict"]


def test_none_is_no_function_and_other_things_are_refused():
    trainer_of().fit(ramp(), callbacks=LambdaCallback(on_epoch_end=None), verbose=0)
    with pytest.raises(ConfigurationError, match=r"on_epoch_end='print'\); expected a function"):
        LambdaCallback(on_epoch_end="print")


def test_other_names_become_attributes_and_misspelt_hooks_warn():
    assert LambdaCallback(level=3).level == 3
    with pytest.warns(UserWarning, match="on_batch_end=.*no such hook"):
        callback = LambdaCallback(on_batch_end=lambda batch, logs: None)
    trainer_of().fit(ramp(), callbacks=callback, verbose=0)
