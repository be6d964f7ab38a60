import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from mlx_fit.data import DataLoader
from mlx_fit.errors import ResumeError


def rows(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_sampler_decides_the_order(drop_last):
    options = {"batch_size": 4, "sampler": [9, 9, 0, 3, 5], "drop_last": drop_last}
    ours = DataLoader(range(10), **options)
    theirs = torch.utils.data.DataLoader(range(10), **options)
    assert rows(ours) == rows(theirs)
    assert len(ours) == len(theirs)


def test_a_batch_sampler_decides_the_batches():
    batches = [[1, 2, 3], [9], [4, 4]]
    loader = DataLoader(range(10), batch_sampler=batches)
    assert rows(loader) == batches
    assert len(loader) == 3


def test_a_sampler_of_torch_is_told_the_epoch():
    sampler = DistributedSampler(range(12), num_replicas=2, rank=1, seed=4)
    loader = DataLoader(range(12), batch_size=3, sampler=sampler)
    first, second = rows(loader), rows(loader)
    sampler.set_epoch(1)
    expected = list(sampler)
    assert second == [expected[:3], expected[3:]]
    assert second != first


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [
    {"batch_size": 2, "sampler": [5, 4, 3, 2, 1]},
    {"batch_sampler": BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)},
    {"batch_sampler": [[3, 1], [2], [4, 5, 0]]},
])  # fmt: skip
def test_samplers_resume_where_they_were(options, num_batches):
    loader, resumed = DataLoader(range(10), **options), DataLoader(range(10), **options)
    iterator, whole = iter(loader), rows(DataLoader(range(10), **options))
    for _ in range(num_batches):
        next(iterator)
    resumed.load_state_dict({**loader.state_dict(), "seed": resumed.seed})
    assert rows(resumed) == whole[num_batches:]
    assert rows(resumed) == whole


def test_a_batch_sampler_that_does_not_repeat_itself_is_refused():
    resumed = DataLoader(range(10), batch_sampler=[[0, 1, 2], [3]])
    resumed.load_state_dict({**resumed.state_dict(), "samples_consumed": 2})
    with pytest.raises(ResumeError, match="after 2 samples"):
        next(iter(resumed))


@pytest.mark.parametrize(
    ("dataset", "where"), [([1, 2, 3], "sample 7"), (np.arange(3), r"samples [7, 1]")]
)
def test_an_index_beyond_the_data_is_named(dataset, where):
    with pytest.raises(IndexError) as caught:
        list(DataLoader(dataset, batch_size=2, sampler=[0, 1, 7, 1]))
    assert f"{where} (epoch 0, batch 1" in caught.value.__notes__[0]
