"""The steps of training: what each draws, the same in all processes, and this process's parts of it, ready to use."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .augment import ACROSS, NUMBERS, Augmentation
from .streams import BalancedStream, RandomStream

Draw = dict[
    str, Tensor
]  # of a step: indices [n], numbers [n, NUMBERS]; and num_balanced [], which come first


@dataclass(frozen=True)
class Drawn:
    """The ingredients of a part, drawn on the CPU; once on the device, the part is made without the CPU."""

    indices: Tensor  # of samples, [b], the balanced stream's first
    numbers: Tensor  # [b, NUMBERS]
    num_balanced: int
    shares: dict[str, float]  # as a part's

    def to(self, device: torch.device) -> Drawn:
        return replace(self, indices=sent(self.indices, device), numbers=sent(self.numbers, device))


@dataclass(frozen=True)
class Part:
    """Samples [b, …] and classes [b] that go through the model together, the balanced stream's first."""

    x: Tensor
    y: Tensor
    num_balanced: int
    #: Of each stream's samples in the step, how many are in this part: by what a mean over them counts in the step's.
    shares: dict[str, float]
    #: A number from 0 to below 1 for each sample, [b], for what is left to chance beyond the input.
    chance: Tensor


class Batches:
    """Endless steps of both streams, of which this process takes every part that is its own.

    A step's samples are divided into as many parts as there are processes times micro-batches, each stream in equal
    ones. What is drawn does not depend on how it is divided.

    Args:
        x: samples [n, …], on the device or the CPU.
        y: their classes [n], on the device.
        random: the random stream.
        balanced: the balanced stream.
        sizes: samples from the balanced and from the random stream in each step; begins again at its end.
        augment: what happens to images, on the device.
        generator: of the augmentation's numbers.
        parts: this process's parts and how many there are.
        ahead: make a step while the one before is in use, in a thread. What is drawn is the same.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        random: RandomStream,
        balanced: BalancedStream,
        sizes: list[tuple[int, int]],
        augment: Augmentation,
        generator: torch.Generator,
        parts: tuple[range, int] = (range(1), 1),
        ahead: bool = False,
    ) -> None:
        self.x, self.y, self.random, self.balanced, self.sizes = x, y, random, balanced, sizes
        self.augment, self.generator = augment, generator
        self.own, self.num_parts = parts
        self._executor = ThreadPoolExecutor(1) if ahead else None
        self._pending: tuple[Draw, Future[list[Part]] | None] | None = None
        self._drawn = 0

    def next(self) -> list[Part]:
        """This process's parts of the next step."""
        if self._executor is None:
            return [self.made(drawn) for drawn in self.next_drawn()]
        parts = (self._pending and self._pending[1]) or self._begin(self._next_draw())
        made = parts.result()
        draw = self._draw()
        self._pending = draw, self._begin(draw)
        return made

    def next_drawn(self) -> list[Drawn]:
        """The ingredients of this process's parts of the next step, on the CPU: for who makes them, with `made`."""
        return self._divided(self._next_draw())

    def made(self, drawn: Drawn) -> Part:
        """The part. If `drawn` and the samples are on the device, nothing waits for the CPU, nor the CPU for it."""
        device = self.y.device
        on_device = drawn.to(device)
        indices, numbers = on_device.indices, on_device.numbers
        x = self.x[indices] if self.x.device == device else sent(self.x[drawn.indices], device)
        # Of a number of 24 bits the lower twelve: augmentation looks at the upper ones.
        chance = (numbers[:, ACROSS] * 4096).frac()
        return Part(self.augment(x, numbers), self.y[indices], drawn.num_balanced, drawn.shares, chance)

    def _next_draw(self) -> Draw:
        """The one that was made ahead, or is from a checkpoint, if there is one."""
        if self._pending is None:
            return self._draw()
        draw, self._pending = self._pending[0], None
        return draw

    def _draw(self) -> Draw:
        num_balanced, num_random = self.sizes[self._drawn % len(self.sizes)]
        self._drawn += 1
        indices = torch.cat([self.balanced.take(num_balanced), self.random.take(num_random)])
        numbers = torch.rand(len(indices), NUMBERS, generator=self.generator)
        return {"indices": indices, "numbers": numbers, "num_balanced": torch.tensor(num_balanced)}

    def _begin(self, draw: Draw) -> Future[list[Part]]:
        assert self._executor is not None
        return self._executor.submit(lambda: [self.made(drawn) for drawn in self._divided(draw)])

    def _divided(self, draw: Draw) -> list[Drawn]:
        num_balanced = int(draw["num_balanced"])
        num_random = len(draw["indices"]) - num_balanced
        return [self._part(draw, part, num_balanced, num_random) for part in self.own]

    def _part(self, draw: Draw, part: int, num_balanced: int, num_random: int) -> Drawn:
        first_balanced, last_balanced = self._bounds(part, num_balanced)
        first_random, last_random = self._bounds(part, num_random)
        rows = torch.cat(
            [
                torch.arange(first_balanced, last_balanced),
                torch.arange(num_balanced + first_random, num_balanced + last_random),
            ]
        )
        own_balanced, own_random = last_balanced - first_balanced, last_random - first_random
        shares = {
            "loss_balanced": own_balanced / max(1, num_balanced),
            "loss_random": own_random / max(1, num_random),
        }
        return Drawn(draw["indices"][rows], draw["numbers"][rows], own_balanced, shares)

    def part_sizes(self, step: int = 0) -> list[tuple[int, int]]:
        """Of this process's parts of a step of an epoch, the samples of the balanced and of the random stream."""
        bounds = [[self._bounds(part, count) for count in self.sizes[step]] for part in self.own]
        return [(balanced[1] - balanced[0], random[1] - random[0]) for balanced, random in bounds]

    def _bounds(self, part: int, count: int) -> tuple[int, int]:
        return count * part // self.num_parts, count * (part + 1) // self.num_parts

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same in all processes: `next` goes on with the step after the last one it gave."""
        return {
            "drawn": self._drawn,
            "pending": self._pending[0] if self._pending else None,
            "random": self.random.state_dict(),
            "balanced": self.balanced.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        self.random.load_state_dict(state["random"])
        self.balanced.load_state_dict(state["balanced"])
        self.generator.set_state(state["generator"])
        self._pending = None
        if pending := state["pending"]:
            self._pending = pending, self._begin(pending) if self._executor else None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU by way of memory that it copies from on its own, while the CPU goes on."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sizes_of_steps(
    num_samples: int, batch_size: int, balanced: int, most: int | None, least: int = 1
) -> list[tuple[int, int]]:
    """For each step of an epoch, one pass of the random stream: samples of the balanced and of the random stream.

    A last batch of fewer than `least` samples goes with the one before; no epoch has more than `most` steps.
    """
    full, rest = divmod(num_samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if 0 < rest < least and full:
        sizes[-2:] = [batch_size + rest]
    return [(balanced, random) for random in sizes[:most]]
