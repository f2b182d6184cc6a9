"""Softmax focal loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from .method import Method, Stage, wide

#: γ, the best value of Lin et al., section 5.1; the value of the field's comparisons of long-tailed classifiers too.
FOCUS = 2


class Focal(Method):
    """A linear classifier with the softmax focal loss (Lin, Goyal, Girshick, He, Dollár, ICCV 2017, equation 4).

        L = mean of -(1 - p_y)^γ log p_y,    p = softmax(w_k · f + b_k),  γ = 2

    The paper defines the loss for binary p; with softmax it is the form of the field's comparisons. It trains on the random
    stream in one stage.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.stages = [Stage("", config.optim.stage1_epochs + config.optim.stage2_epochs, "random")]
        self.loss_coefficients = {"loss_random": 1.0}

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes)

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
