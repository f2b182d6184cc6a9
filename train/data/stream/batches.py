"""The mini-batches of training, drawn the same in all processes, and the micro-batches of this process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .augment import NUM_UNIFORMS, Augmentation
from .mixing import MixedLabels, Mixing, partners_of
from .streams import BalancedStream, RandomStream

#: The draw of one step, as a checkpoint stores it: indices [n], the first num_balanced [] of them from the balanced stream,
#: numbers [n, NUM_UNIFORMS] for the augmentation, and transfer_uniforms [n], all uniform in [0, 1). With mixup or CutMix also
#: mix_keys [n], whose order within a micro-batch is that of its partners, and mix_numbers from `Mixing.draw`.
StepDraw = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatchDraw:
    """The samples and random numbers of a micro-batch, before images are read and augmented."""

    indices: Tensor  # samples [b], those of the balanced stream first
    augment_uniforms: Tensor  # [b, NUM_UNIFORMS]
    transfer_uniforms: Tensor  # [b]
    num_balanced: int
    loss_weights: dict[str, float]
    mixing: tuple[
        Tensor, ...
    ] = ()  # partners [b] and numbers [4] for `Mixing`; empty without mixup and CutMix

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.indices, self.augment_uniforms, self.transfer_uniforms, *self.mixing

    def with_tensors(
        self, indices: Tensor, augment_uniforms: Tensor, transfer_uniforms: Tensor, *mixing: Tensor
    ) -> MicroBatchDraw:
        """Return the draw with other tensors of the same shapes."""
        return replace(
            self,
            indices=indices,
            augment_uniforms=augment_uniforms,
            transfer_uniforms=transfer_uniforms,
            mixing=mixing,
        )

    def to(self, device: torch.device) -> MicroBatchDraw:
        return self.with_tensors(*(to_device(tensor, device) for tensor in self.tensors))


@dataclass(frozen=True)
class MicroBatch:
    """Samples [b, …] and labels [b] that go through the model together, those of the balanced stream first."""

    x: Tensor
    y: Tensor
    num_balanced: int
    #: The fraction of each stream's samples of the step that are in this micro-batch: the weight of its mean loss.
    loss_weights: dict[str, float]
    #: One random number per sample, uniform in [0, 1), [b]: selects the direction of a feature transfer.
    transfer_uniforms: Tensor
    #: The second labels of samples that are mixed.
    mixed: MixedLabels | None = None


class Batches:
    """An endless sequence of steps, each with samples of both streams, split into micro-batches.

    A step is split into world size × accumulate micro-batches with equal numbers of samples of each stream. Each process
    materializes its own micro-batches. The draws do not depend on the split, but with mixup or CutMix the pairs do: both
    samples of a pair are in the same stream of the same micro-batch.

    Args:
        x: samples [n, …], on the device or the CPU.
        y: their labels [n], on the device.
        random: the random stream.
        balanced: the balanced stream.
        sizes: for each step of an epoch, the numbers of samples from the balanced and the random stream. Repeats.
        augment: the augmentation of images, on the device.
        generator: draws the random numbers of the augmentation and the mixing.
        transfer_generator: draws `MicroBatch.transfer_uniforms`. It is separate, so that they do not change other draws.
        micro_batches: the indices of this process's micro-batches, and the number of all micro-batches of a step.
        ahead: prepare the next step in a thread while the current one is in use. The draws are the same.
        subset: the indices of the samples that the streams draw from; all samples if None.
        mixing: the mixing of samples after the augmentation.
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
        transfer_generator: torch.Generator,
        micro_batches: tuple[range, int],
        ahead: bool,
        subset: Tensor | None,
        mixing: Mixing,
    ) -> None:
        self.subset = subset
        self.x, self.y, self.random, self.balanced, self.sizes = x, y, random, balanced, sizes
        self.augment, self.mixing = augment, mixing
        self.generator, self.transfer_generator = generator, transfer_generator
        self.local_indices, self.num_micro_batches = micro_batches
        self._executor = ThreadPoolExecutor(1) if ahead else None
        self._pending: tuple[StepDraw, Future[list[MicroBatch]] | None] | None = None
        self._drawn = 0

    def next(self) -> list[MicroBatch]:
        """Return this process's micro-batches of the next step."""
        if self._executor is None:
            return [self.materialize(draw) for draw in self.next_draws()]
        prepared = (self._pending and self._pending[1]) or self._prepare(self._next_draw())
        micro_batches = prepared.result()
        draw = self._draw()
        self._pending = draw, self._prepare(draw)
        return micro_batches

    def next_draws(self) -> list[MicroBatchDraw]:
        """Return the draws of this process's micro-batches of the next step, on the CPU, for `materialize`."""
        return self._split(self._next_draw())

    def materialize(self, draw: MicroBatchDraw) -> MicroBatch:
        """Read and augment the samples of a draw. The host does not wait if the draw and the samples are on the device."""
        device = self.y.device
        on_device = draw.to(device)
        x = self.x[on_device.indices] if self.x.device == device else to_device(self.x[draw.indices], device)
        x = self.augment(x, on_device.augment_uniforms, self.augment.seeds(draw.augment_uniforms))
        y, mixed = self.y[on_device.indices], None
        if draw.mixing:
            x, mixed = self.mixing(x, y, *on_device.mixing)
        return MicroBatch(x, y, draw.num_balanced, draw.loss_weights, on_device.transfer_uniforms, mixed)

    def _next_draw(self) -> StepDraw:
        """Return the pending draw, which was prepared ahead or comes from a checkpoint, or a new one."""
        if self._pending is None:
            return self._draw()
        draw, self._pending = self._pending[0], None
        return draw

    def _draw(self) -> StepDraw:
        num_balanced, num_random = self.sizes[self._drawn % len(self.sizes)]
        self._drawn += 1
        indices = torch.cat([self.balanced.take(num_balanced), self.random.take(num_random)])
        indices = indices if self.subset is None else self.subset[indices]
        draw = {
            "indices": indices,
            "numbers": torch.rand(len(indices), NUM_UNIFORMS, generator=self.generator),
            "transfer_uniforms": self._transfer_uniforms(len(indices)),
            "num_balanced": torch.tensor(num_balanced),
        }
        if self.mixing:
            draw["mix_keys"] = torch.rand(len(indices), generator=self.generator)
            draw["mix_numbers"] = self.mixing.draw(self.generator)
        return draw

    def _transfer_uniforms(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.transfer_generator)

    def _prepare(self, draw: StepDraw) -> Future[list[MicroBatch]]:
        assert self._executor is not None
        return self._executor.submit(lambda: [self.materialize(part) for part in self._split(draw)])

    def _split(self, draw: StepDraw) -> list[MicroBatchDraw]:
        return [self._micro_batch_draw(draw, index) for index in self.local_indices]

    def _micro_batch_draw(self, draw: StepDraw, index: int) -> MicroBatchDraw:
        num_balanced = int(draw["num_balanced"])
        num_random = len(draw["indices"]) - num_balanced
        first_balanced, last_balanced = self._bounds(index, num_balanced)
        first_random, last_random = self._bounds(index, num_random)
        rows = torch.cat(
            [
                torch.arange(first_balanced, last_balanced),
                torch.arange(num_balanced + first_random, num_balanced + last_random),
            ]
        )
        local_balanced, local_random = last_balanced - first_balanced, last_random - first_random
        random_share = local_random / max(1, num_random)
        loss_weights = {
            "loss_balanced": local_balanced / num_balanced
            if num_balanced
            else random_share,  # of shared samples
            "loss_random": random_share,
        }
        return MicroBatchDraw(
            draw["indices"][rows],
            draw["numbers"][rows],
            draw["transfer_uniforms"][rows],
            local_balanced,
            loss_weights,
            (partners_of(draw["mix_keys"][rows], local_balanced), draw["mix_numbers"]) if self.mixing else (),
        )

    def micro_batch_sizes(self) -> list[tuple[int, int]]:
        """Return the numbers of balanced and random samples in each of this process's micro-batches of the first step."""
        bounds = [[self._bounds(index, count) for count in self.sizes[0]] for index in self.local_indices]
        return [(balanced[1] - balanced[0], random[1] - random[0]) for balanced, random in bounds]

    def _bounds(self, index: int, count: int) -> tuple[int, int]:
        return count * index // self.num_micro_batches, count * (index + 1) // self.num_micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the same in all processes: `next` continues with the step after the last one it returned."""
        return {
            "drawn": self._drawn,
            "pending": self._pending[0] if self._pending else None,
            "random": self.random.state_dict(),
            "balanced": self.balanced.state_dict(),
            "generator": self.generator.get_state(),
            "transfer_generator": self.transfer_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        self.random.load_state_dict(state["random"])
        self.balanced.load_state_dict(state["balanced"])
        self.generator.set_state(state["generator"])
        if "transfer_generator" in state:  # absent from older checkpoints
            self.transfer_generator.set_state(state["transfer_generator"])
        self._pending = None
        if pending := state["pending"]:
            if "transfer_uniforms" not in pending:
                pending |= {"transfer_uniforms": self._transfer_uniforms(len(pending["indices"]))}
            self._pending = pending, self._prepare(pending) if self._executor else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`; to a GPU asynchronously, from pinned memory."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def step_sizes(
    num_samples: int, batch_size: int, num_balanced: int, max_steps: int | None, min_batch: int
) -> list[tuple[int, int]]:
    """Return the numbers of samples from the balanced and the random stream for each step of an epoch.

    An epoch is one pass of the random stream, but at most `max_steps` steps. If the last step would have fewer than
    `min_batch` samples of the random stream, it is merged into the previous step.
    """
    full, rest = divmod(num_samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if 0 < rest < min_batch and full:
        sizes[-2:] = [batch_size + rest]
    return [(num_balanced, num_random) for num_random in sizes[:max_steps]]
