"""The range loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_loss import PairLoss

# The values of public implementations for features of unit length. The paper's are for features of any length.
NUM_RANGES = 2  # k of the paper
MARGIN = 0.1
INTRA_WEIGHT = INTER_WEIGHT = 0.5  # α and β of the paper
#: The least range in the harmonic mean, so that samples that are equal have a finite gradient.
LEAST_RANGE = 1e-6


class RangeLoss(PairLoss):
    """The range loss beside the cross-entropy (Zhang, Fang, Wen, Li, Qiao, ICCV 2017).

        L_pairs = α mean_c (k / Σ_{j ≤ k} 1/D_cj) + β max(0, m − min_{c ≠ c'} ‖μ_c − μ_c'‖)

    D_cj is the j-th largest distance between two samples of class c in the group, and μ_c is the mean of the samples of class
    c. k is 2, m is 0.1, and α and β are 0.5. For a class with a single pair k is 1, and a class without a pair adds 0.

    The paper has the sum over the classes and squared distances. The sum would outweigh the cross-entropy, which is a mean
    over the samples, by a factor that grows with the group. Public implementations have distances that are not squared.
    """

    def pair_loss(self, units: Tensor, labels: Tensor) -> Tensor:
        same = labels[:, None] == labels
        return INTRA_WEIGHT * intra_class_loss(units, same) + INTER_WEIGHT * inter_class_loss(units, same)


# The shapes below depend on the number of samples alone, so that a CUDA graph can capture a step: a row stands for the class
# of its sample, and the rows of a class are equal.


def intra_class_loss(units: Tensor, same: Tensor) -> Tensor:
    """Return the mean over the classes of the harmonic mean of their NUM_RANGES largest distances.

    Args:
        units: the samples, [n, d].
        same: a mask of the pairs of one class, [n, n].
    """
    num = min(NUM_RANGES, len(units))
    pairs = torch.cdist(units, units).masked_fill(~same.triu(1), -torch.inf)
    # Each of a class's largest distances is among the largest of its row.
    largest = pairs.topk(num, dim=1).values
    candidates = largest.masked_fill(~same[:, :, None], -torch.inf)  # [n, n, num]
    ranges = candidates.flatten(1).topk(num, dim=1).values
    exists = ranges > -torch.inf
    inverse_sums = torch.where(exists, 1 / ranges.clamp(min=LEAST_RANGE), 0.0).sum(
        1
    )  # at least 1/2, or 0 without a pair
    harmonic_means = exists.sum(1) / inverse_sums.clamp(min=0.25)
    weights = 1 / same.to(units.dtype).sum(1)  # the rows of a class have a total of 1
    return (weights * harmonic_means).sum() / weights.sum()


def inter_class_loss(units: Tensor, same: Tensor) -> Tensor:
    """Return the shortfall of the smallest distance between two class means from MARGIN; 0 for a single class.

    Args:
        units: the samples, [n, d].
        same: a mask of the pairs of one class, [n, n].
    """
    means = same.to(units.dtype) @ units / same.sum(1, keepdim=True)
    smallest = torch.cdist(means, means).masked_fill(same, torch.inf).min()
    return (MARGIN - smallest).relu()
