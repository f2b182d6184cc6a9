"""The random stream. `tests/test_sampling.py` tests the class-balanced one."""

from __future__ import annotations

import torch

from train.data.stream.streams import RandomStream

from ..conftest import COUNTS


def test_random_stream_passes_over_all_samples(seed: int) -> None:
    size = sum(COUNTS)
    stream = RandomStream(size, torch.Generator().manual_seed(seed))
    taken = torch.cat([stream.take(count) for count in [7] * 100])
    passes = taken[: len(taken) // size * size].view(-1, size)
    assert len(passes) >= 3
    for one in passes:
        assert torch.equal(one.sort().values, torch.arange(size))
    assert not torch.equal(passes[0], passes[1])
