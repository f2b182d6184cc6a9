"""The lifted structured loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .pair_loss import PairLoss

MARGIN = 1.0  # α of the paper


class LiftedLoss(PairLoss):
    """The lifted structured loss beside the cross-entropy (Oh Song, Xiang, Jegelka, Savarese, CVPR 2016, equation 4).

        L_pairs = 1/(2|P|) Σ_{(i,j) ∈ P} max(0, J_ij)²
        J_ij    = D_ij + log(Σ_{k: y_k ≠ y_i} exp(α − D_ik) + Σ_{l: y_l ≠ y_j} exp(α − D_jl))

    P are the pairs of one class, D_ij is the distance between features of unit length, and α is 1. The paper's features
    have any length; the unit length is the default of pytorch-metric-learning, which computes the loss. The number of pairs
    depends on the labels, so that steps are not captured in CUDA graphs.
    """

    capturable = False

    def pair_loss(self, units: Tensor, labels: Tensor) -> Tensor:
        # Each positive pair once: the library would take it in both orders, with the same mean and twice the memory.
        same = labels[:, None] == labels
        pairs = *same.triu(1).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True)
        loss: Tensor = structure_loss()(units, labels, pairs)
        return loss


def structure_loss() -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]:
    """Return the loss of pytorch-metric-learning.

    Raises:
        ImportError: the package is not installed.
    """
    from pytorch_metric_learning.losses import LiftedStructureLoss  # seconds, too long for --help

    loss: Callable[..., Tensor] = LiftedStructureLoss(neg_margin=MARGIN, pos_margin=0)
    return loss
