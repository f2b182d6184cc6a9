"""The common part of methods that add a loss of pairs of samples to the cross-entropy."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..model.precision import wide
from .single_stage import SingleStageMethod


class PairLoss(SingleStageMethod):
    """A linear softmax classifier on the balanced stream, whose loss also compares samples with each other.

        L = CE(W f + b, y) + L_pairs(f/‖f‖, y)

    L_pairs compares the samples of a group: --classes-per-batch × --samples-per-class samples that follow each other in
    the stream, 32 × 4 as in the publications. A step has more samples than a group, because it takes the random stream's
    share from the balanced stream too. Its loss is the mean over its groups, weighted by their sizes. Groups do not extend
    over micro-batches or processes: with --accumulate or several processes, smaller micro-batches have fewer pairs.

    L_pairs trains the features alone. It is left out where they are not trained, as with --recipe features.
    """

    stream: Literal["balanced"] = "balanced"
    prior_exponent = 0.0

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.group_size = math.prod(config.method.balanced_sizes(len(counts)))

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        loss = F.cross_entropy(wide(head(features)), labels)
        if features.requires_grad:
            with torch.autocast(features.device.type, enabled=False):
                units = F.normalize(wide(features), dim=1)
                groups = zip(units.split(self.group_size), labels.split(self.group_size), strict=True)
                sums = [len(y) * self.pair_loss(x, y) for x, y in groups]
                loss = loss + torch.stack(sums).sum() / len(labels)
        return {"loss_balanced": loss}

    def pair_loss(self, units: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a group of samples, 0 if it has no pair that the loss compares.

        Args:
            units: features of unit length, [n, d] in float32 or float64.
            labels: their classes, [n].
        """
        raise NotImplementedError
