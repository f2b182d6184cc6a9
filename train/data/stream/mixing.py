"""Mixup and CutMix of batches of samples by given random numbers, so that runs repeat and resume."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MixedLabels(NamedTuple):
    """The second label of each mixed sample, [b], and the share of the first one, []."""

    labels: Tensor
    share: Tensor


@dataclass(frozen=True)
class Mixing:
    """The mixing of pairs of samples. By default samples are left unchanged.

        mixup:    x = λ x_i + (1 - λ) x_j                       (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018)
        CutMix:   x = x_i with a box of 1 - λ of the area from x_j,  (Yun, Han, Oh, Chun, Choe, Yoo, ICCV 2019)

    λ ~ Beta(α, α) is drawn once per step, and j is a random permutation of i within a stream of a micro-batch. A box is cut
    at the image's edge, and λ is then the share of the area that is left of x_i, as in the authors' code.

    Attributes:
        mixup: α of mixup; 0 for none.
        cutmix: α of CutMix; 0 for none. If both are above 0, each step has one of them at random.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the random numbers of a step, [4] float64: λ, 1 for CutMix or 0 for mixup, and x and y of the box's center.

        torch draws no Beta numbers from a generator, so Python's generator draws them from a seed of torch's.
        """
        cut = torch.rand((), generator=generator) < (self.cutmix > 0) * (0.5 if self.mixup > 0 else 1.0)
        seed = int(torch.randint(2**62, (), generator=generator))
        alpha = self.cutmix if cut else self.mixup
        share = random.Random(seed).betavariate(alpha, alpha)
        center = torch.rand(2, generator=generator, dtype=torch.float64)
        return torch.cat([torch.tensor([share, float(cut)], dtype=torch.float64), center])

    def __call__(self, x: Tensor, y: Tensor, partners: Tensor, numbers: Tensor) -> tuple[Tensor, MixedLabels]:
        """Mix samples with others of the batch.

        As in `Augmentation`, all work is done on the samples' device, and a CUDA graph can capture it.

        Args:
            x: images [b, c, h, w], uint8 or from 0 to 255, or features [b, d], without CutMix.
            y: their labels, [b].
            partners: the position in the batch of the sample that each one is mixed with, [b].
            numbers: from `draw`.

        Returns:
            floating-point samples and their labels beside `y`.
        """
        x = x if x.is_floating_point() else x.float()
        share = numbers[0]
        weight = share.to(x.dtype)
        if self.cutmix:
            in_box = box(numbers, *x.shape[2:])
            is_cut = numbers[1] > 0
            share = torch.where(is_cut, 1 - in_box.double().mean(), share)
            weight = torch.where(is_cut, (~in_box).to(x.dtype), weight)
        return torch.lerp(x[partners], x, weight), MixedLabels(y[partners], share)


def box(numbers: Tensor, height: int, width: int) -> Tensor:
    """Return the mask [height, width] of the pixels that CutMix replaces; the box may be empty.

    Args:
        numbers: from `Mixing.draw`.
        height: the images' height.
        width: the images' width.
    """
    half = (1 - numbers[0]).sqrt() / 2
    inside = []
    for size, center in ((height, numbers[3]), (width, numbers[2])):
        pixels = torch.arange(size, device=numbers.device)
        middle, reach = (center * size).floor(), (half * size).floor()
        inside.append((middle - reach <= pixels) & (pixels < middle + reach))
    return inside[0][:, None] & inside[1]


def partners_of(keys: Tensor, num_balanced: int) -> Tensor:
    """Return a permutation of the samples of each stream of a micro-batch.

    Args:
        keys: random numbers, [b].
        num_balanced: the number of samples of the balanced stream, which are the first ones.
    """
    balanced, rest = keys.tensor_split([num_balanced])
    return torch.cat([balanced.argsort(stable=True), num_balanced + rest.argsort(stable=True)])
