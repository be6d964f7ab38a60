"""Buffers and streams of mlx-data itself."""

from itertools import chain

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.data import DataLoader, from_mlx_data, order
from mlx_fit.errors import ConfigurationError, DataError

mlx_data = pytest.importorskip("mlx.data")


def samples(n=10):
    return [{"image": np.full(3, i, np.float32), "label": np.float32(i)} for i in range(n)]


def buffer(n=10):
    return mlx_data.buffer_from_vector(samples(n))


def labels(loader):
    return [y.tolist() for _, y in loader]


def test_a_buffer_is_a_dataset_in_our_order():
    rows = from_mlx_data(buffer(), "image", "label")
    loader = DataLoader(rows, 4, shuffle=True, seed=2)
    assert list(chain(*labels(loader))) == order(2, 0, 10).tolist()
    state = loader.state_dict()
    resumed = DataLoader(rows, 4, shuffle=True, seed=2)
    resumed.load_state_dict(state)
    assert labels(resumed) == labels(loader)
    assert rows[-1][1] == 9
    with pytest.raises(IndexError):
        rows[10]


def test_samples_stay_dicts_without_keys_and_several_keys_make_one():
    batch = next(iter(DataLoader(from_mlx_data(buffer()), 2)))
    assert {name: array.shape for name, array in batch.items()} == {"image": (2, 3), "label": (2,)}
    x, y = from_mlx_data(buffer(), ["image", "label"], "label")[3]
    assert (sorted(x), float(y)) == (["image", "label"], 3)


def test_a_stream_of_samples_is_batched_here_again_each_epoch_and_resumes():
    loader = DataLoader(from_mlx_data(buffer().to_stream(), "image", "label"), 4)
    for _ in range(2):
        assert labels(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    iterator = iter(loader)
    next(iterator)
    resumed = DataLoader(from_mlx_data(buffer().to_stream(), "image", "label"), 4)
    resumed.load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match="first 4 rows"):
        assert labels(resumed) == [[4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("prefetch", [False, True])
def test_fit_goes_through_a_stream_of_batches_in_every_epoch(prefetch):
    stream = buffer().to_stream().key_transform("label", lambda y: y.reshape(1)).batch(4)
    if prefetch:  # by one thread: several of mlx-data's may cut the last batch in two
        stream = stream.prefetch(2, 1)
    trainer = Trainer(nn.Linear(3, 1), optim.SGD(1e-4), "mse")
    trainer.fit(from_mlx_data(stream, "image", "label"), epochs=3, verbose=0)
    assert trainer.optimizer.step.item() == 9


def test_a_stream_as_it_is_starts_again_too():
    stream = buffer().to_stream()
    loader = DataLoader(stream, 5)
    assert [[b["label"].tolist() for b in loader] for _ in range(2)] == [
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    ] * 2

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def __call__(self, image, label):
            return self.layer(image)

    trainer = Trainer(Dense(), optim.SGD(1e-4), lambda outputs, y: outputs.mean())
    batches = stream.batch(4)
    assert [len(trainer.predict(batches)) for _ in range(2)] == [10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "source is a list; expected an mlx.data.Buffer"),
        ((buffer(), None, "label"), "needs x"),
        ((buffer(), 3), "x=3"),
        ((buffer(), []), "x="),
        ((buffer(), "image", ["label"]), "y="),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        from_mlx_data(*arguments)


def test_a_missing_key_is_named():
    with pytest.raises(DataError, match="no 'pixels'; it has image, label") as caught:
        from_mlx_data(buffer(), "pixels")[0]
    assert caught.value.field == "pixels"


def test_processes_are_refused_with_a_reason():
    loader = DataLoader(from_mlx_data(buffer()), 2, num_workers=1)
    with pytest.raises(ConfigurationError, match="needs a dataset that can be pickled"):
        list(loader)
