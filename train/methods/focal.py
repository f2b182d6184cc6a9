"""Softmax focal loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.precision import wide
from .single_stage import SingleStageMethod

#: γ, the best value of Lin et al., section 5.1; the value of the field's comparisons of long-tailed classifiers too.
FOCUS = 2


class Focal(SingleStageMethod):
    """A linear classifier with the softmax focal loss (Lin, Goyal, Girshick, He, Dollár, ICCV 2017, equation 4).

        L = mean of -(1 - p_y)^γ log p_y,    p = softmax(w_k · f + b_k),  γ = 2

    The paper defines the loss for binary p; with softmax it is the form of the field's comparisons. It trains on the random
    stream in one stage.
    """

    mixes_labels = True

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        return {"loss_random": focal_loss(head(features), labels)}


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean softmax focal loss, in float32 or wider.

    Args:
        logits: [b, K].
        labels: classes, [b].
    """
    logits = wide(logits)
    loss = F.cross_entropy(logits, labels, reduction="none")
    wrong = -torch.expm1(-loss)  # 1 - p_y without cancellation
    return (wrong**FOCUS * loss).mean()
