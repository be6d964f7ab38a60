"""Datasets, loaders and tensors of PyTorch go into fit as they are."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer
from mlx_fit.batch import to_mlx
from mlx_fit.errors import ConfigurationError

torch = pytest.importorskip("torch")
Dataset, TensorDataset = torch.utils.data.Dataset, torch.utils.data.TensorDataset


def tensors(rows=12):
    torch.manual_seed(0)
    return torch.randn(rows, 4), torch.randint(0, 3, (rows,))


def final_weight(train, batch_size=4):
    mx.random.seed(0)
    model = nn.Linear(4, 3)
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy", batch_size=batch_size)
    trainer.fit(train, epochs=2, shuffle=False, verbose=0)
    return np.array(model.weight)


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        x, y = tensors()
        return x[index], y[index]


def test_tensors_datasets_and_loaders_train_alike():
    x, y = tensors()
    expected = final_weight((x.numpy(), y.numpy()))
    loader = torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=4)
    for train in ((x, y), TensorDataset(x, y), Rows(), loader):
        np.testing.assert_array_equal(final_weight(train), expected)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return zip(*tensors(), strict=True)


def test_a_loader_over_a_stream_trains_alike():
    x, y = tensors()
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    np.testing.assert_array_equal(final_weight(loader), final_weight((x.numpy(), y.numpy())))


def test_batches_of_bfloat16_keep_their_bits():
    x, y = tensors()
    x = x.bfloat16()
    loader = torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=4)
    assert to_mlx(x).dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(to_mlx(x).astype(mx.float32)), x.float().numpy())
    np.testing.assert_allclose(final_weight(loader), final_weight((x.float(), y)), rtol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.requires_grad_(),
        lambda x: x.t().contiguous().t(),
        lambda x: x.double(),
        lambda x: x[::2],
    ],
    ids=["gradient", "strides", "double", "slice"],
)
def test_any_dense_tensor_is_a_batch(change):
    tensor = change(torch.randn(4, 3))
    got = to_mlx((tensor, None))[0]
    np.testing.assert_array_equal(np.array(got), tensor.detach().float().numpy())


def test_the_calls_of_other_libraries_are_told_the_right_one():
    model = nn.Linear(4, 3)
    trainer = Trainer(model, optim.SGD(0.1), "cross_entropy")
    x, y = tensors()
    with pytest.raises(ConfigurationError, match=r"Trainer\(model, optimizer, ...\).fit\(loader"):
        trainer.fit(model, [(x, y)])
    with pytest.raises(ConfigurationError, match=r"got the model Linear.*\.fit\(loader"):
        trainer.fit(torch.nn.Linear(4, 3), [(x, y)])
    with pytest.raises(ConfigurationError, match=r"fit\(\(x, y\)\)"):
        trainer.fit(x, y)
    theirs = torch.nn.Linear(4, 3)
    with pytest.raises(ConfigurationError, match="torch"):
        Trainer(theirs, optim.SGD(0.1), "mse")
    with pytest.raises(ConfigurationError, match=r"interop\.torch\.optimizers"):
        Trainer(model, torch.optim.Adam(theirs.parameters()), "mse")
