"""The two streams of training samples, random and class-balanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gistops.sampling import ClassBalancedBatchSampler


class RandomStream:
    """An endless sequence of passes over `size` samples, each in a new random order drawn from `generator`."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._order = torch.randperm(size, generator=generator)
        self._position = 0

    def take(self, count: int) -> Tensor:
        """Return the indices of the next `count` samples, [count]. A new pass begins where the last one ends."""
        parts = [self._order[:0]]
        while count > 0:
            if self._position == len(self._order):
                self._order = torch.randperm(len(self._order), generator=self._generator)
                self._position = 0
            part = self._order[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the order and position of the current pass. The caller stores the generator's state."""
        return {"order": self._order, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._position = state["order"], state["position"]


class BalancedStream:
    """An endless sequence of samples from a class-balanced sampler, taken in any numbers."""

    def __init__(self, sampler: ClassBalancedBatchSampler) -> None:
        self.sampler = sampler
        self._batches = iter(sampler)
        self._rest: list[int] = []  # samples of the last batch that are not taken yet

    def take(self, count: int) -> Tensor:
        """Return the indices of the next `count` samples, [count]."""
        while len(self._rest) < count:
            self._rest += next(self._batches)
        taken, self._rest = self._rest[:count], self._rest[count:]
        return torch.tensor(taken, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler, and the rest of its last batch."""
        return {"sampler": self.sampler.state_dict(), "rest": list(self._rest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self._rest = list(state["rest"])
