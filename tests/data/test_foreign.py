"""Datasets and loaders of other libraries, taken as they are."""

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch

from mlx_fit import Trainer
from mlx_fit.data import DataLoader


class Table:
    """What a Hugging Face or Arrow dataset offers: columns; rows as dicts, by list of indices."""

    def __init__(self, columns):
        self.columns = columns
        self.asked = []

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        if isinstance(key, (list, slice)):
            raise AssertionError("__getitems__ is for lists")
        return {name: column[key] for name, column in self.columns.items()}

    def __getitems__(self, indices):
        assert all(type(index) is int for index in indices)
        self.asked.append(indices)
        return [self[index] for index in indices]


def test_a_table_is_read_by_whole_batches_and_rows_become_columns():
    table = Table({"text": list("abcde"), "tokens": [[i, i] for i in range(5)], "y": [0.5] * 5})
    batches = list(DataLoader(table, 2, shuffle=True, seed=0))
    assert [len(asked) for asked in table.asked] == [2, 2, 1]
    first = table.asked[0]
    assert batches[0]["text"] == ["abcde"[i] for i in first]
    assert batches[0]["tokens"].tolist() == [[i, i] for i in first]
    assert batches[0]["y"].dtype == np.float32


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2,), float(index)), torch.tensor(float(index**2))


@pytest.mark.parametrize(
    "make",
    [
        Squares,
        lambda: torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8)),
        lambda: torch.utils.data.Subset(Squares(), [1, 3, 5]),
        lambda: torch.utils.data.ConcatDataset([Squares(), Squares()]),
    ],
)
def test_a_torch_dataset_gives_the_batches_of_torchs_loader(make):
    ours, theirs = DataLoader(make(), 3), torch.utils.data.DataLoader(make(), 3)
    for mine, other in zip(ours, theirs, strict=True):
        for left, right in zip(mine, other, strict=True):
            assert isinstance(left, np.ndarray)
            np.testing.assert_array_equal(left, right.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_takes_torch_datasets_loaders_and_tensors_alike(dtype):
    x, y = torch.arange(16).reshape(8, 2).to(dtype), torch.ones(8, 1)
    pairs = torch.utils.data.TensorDataset(x, y)
    losses = []
    for data in ((x, y), pairs, torch.utils.data.DataLoader(pairs, 4)):
        model = nn.Linear(2, 1)
        model.weight, model.bias = model.weight * 0, model.bias * 0
        trainer = Trainer(model, optim.SGD(0.001), "mse", batch_size=4)
        losses.append(trainer.fit(data, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=1e-2)


def test_a_torch_sampler_is_followed():
    sampler = torch.utils.data.SubsetRandomSampler([1, 2, 5], torch.Generator().manual_seed(0))
    batches = torch.utils.data.BatchSampler([4, 0, 2], 2, drop_last=False)
    assert sorted(np.concatenate(list(DataLoader(range(6), 2, sampler=sampler)))) == [1, 2, 5]
    loader = DataLoader(range(6), batch_sampler=batches)
    assert [batch.tolist() for batch in loader] == [[4, 0], [2]]
