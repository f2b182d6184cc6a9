"""CUDA graphs: forward and backward captured and replayed on other values, with the bits of eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cuda_graphs import captured
from .test_device import CALLS, tensors_of

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", CALLS)
def test_replays_give_the_same_bits(name: str, fused: str, seed: int) -> None:
    tensors = tensors_of(seed)
    leaves = [t for t in tensors if t.requires_grad]

    def step() -> list[Tensor | None]:
        made = [t for t in tree_leaves(CALLS[name](tensors, fused)) if isinstance(t, Tensor)]
        sums = [(t * t).sum() for t in made if t.requires_grad]
        gradients = torch.autograd.grad(sums, leaves, allow_unused=True) if sums else ()
        return [*made, *gradients]

    replay, made = captured(step)
    for again in range(3):
        with torch.no_grad():
            for leaf, value in zip(tensors, tensors_of(seed + again + 1, requires_grad=False), strict=True):
                leaf.copy_(value)
        replay()
        kept = [None if t is None else t.detach().clone() for t in made]
        for a, b in zip(kept, step(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
