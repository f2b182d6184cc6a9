"""Tests of ClassBalancedBatchSampler: epochs, process groups, threads."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gistops.sampling import ClassBalancedBatchSampler

from .processes import in_group

LABELS = [i % 7 for i in range(60)]


def make(num_batches: int | None = None, **arguments: int) -> ClassBalancedBatchSampler:
    return ClassBalancedBatchSampler(LABELS, 3, 2, num_batches=num_batches, **arguments)


def test_an_epoch_has_num_batches_batches_and_the_next_one_continues(seed: int) -> None:
    stream = list(itertools.islice(make(seed=seed), 12))
    sampler = make(4, seed=seed)
    assert len(sampler) == 4
    loader = DataLoader(TensorDataset(torch.arange(60)), batch_sampler=sampler)
    assert len(loader) == 4
    epochs = [[batch.tolist() for (batch,) in loader] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [4, 4, 4]
    assert list(itertools.chain(*epochs)) == stream
    resumed = make(4, seed=seed)
    resumed.load_state_dict({**sampler.state_dict(), "batches": 4})
    assert list(resumed) == stream[4:8]


def test_set_epoch_starts_an_epoch_whatever_was_drawn(seed: int) -> None:
    stream = list(itertools.islice(make(seed=seed), 12))
    sampler = make(4, seed=seed)
    next(iter(sampler))
    for epoch in (2, 0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == stream[4 * epoch : 4 * epoch + 4]
    endless = make(seed=seed)
    endless.set_epoch(3)  # frameworks call it for every sampler that has it
    assert next(iter(endless)) == stream[0]
    for bad, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="epoch: expected an integer"):
            sampler.set_epoch(bad)  # type: ignore[arg-type]


def test_an_endless_sampler_has_no_length() -> None:
    sampler = make()
    with pytest.raises(TypeError, match="no length: expected num_batches, got None"):
        len(sampler)
    assert sampler
    with pytest.raises(ValueError, match="num_batches: expected an integer of at least 1, got 0"):
        make(0)


def test_copies_and_pickles_continue_alike(seed: int) -> None:
    sampler = make(seed=seed)
    next(iter(sampler))
    twins = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    expected = next(iter(sampler))
    assert [next(iter(twin)) for twin in twins] == [expected, expected]


@pytest.mark.parametrize("shared", ["sampler", "iterator"])
def test_threads_draw_each_batch_once(shared: str, seed: int) -> None:
    threads, each = 4, 150
    sampler = make(seed=seed)
    iterator = iter(sampler)
    with ThreadPoolExecutor(threads) as pool:
        work = [
            pool.submit(lambda: list(itertools.islice(iterator if shared == "iterator" else sampler, each)))
            for _ in range(threads)
        ]
        drawn = [batch for future in work for batch in future.result()]
    assert sorted(drawn) == sorted(itertools.islice(make(seed=seed), threads * each))
    assert sampler.state_dict()["batches"] == threads * each


def _draw_in_group(rank: int, folder: str) -> None:
    sampler = make(5)
    assert (sampler.num_replicas, sampler.rank) == (2, rank)
    torch.save(list(sampler), f"{folder}/{rank}.pt")
    alone = make(5, num_replicas=1)
    assert (alone.num_replicas, alone.rank) == (1, 0)
    with pytest.raises(ValueError, match=r"rank: expected 0 to 2, .* world size 2; got None"):
        make(5, num_replicas=3)


def test_ranks_of_a_process_group_share_the_sequence(tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    folder.mkdir()
    (tmp_path / "group").mkdir()
    in_group(_draw_in_group, 2, tmp_path / "group", str(folder))
    for rank in range(2):
        assert torch.load(folder / f"{rank}.pt") == list(make(5, num_replicas=2, rank=rank))
