"""Class-balanced sigmoid focal loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..model.precision import wide
from .class_weights import class_balanced_weights
from .single_stage import SingleStageMethod


class ClassBalancedFocal(SingleStageMethod):
    """A linear classifier with the class-balanced focal loss (Cui, Jia, Lin, Song, Belongie, CVPR 2019, section 4.3).

        L = mean over samples of  weight_y Σ_k -(1 - p_k)^γ log p_k
        p_k = sigmoid(z_k) for k = y, otherwise sigmoid(-z_k),    z_k = w_k · f + b_k
        weight_k ∝ (1 - β) / (1 - β^n_k),  with mean 1 over the classes

    β is --class-balanced-beta and γ is --cb-focal-gamma. The biases start at -log(K - 1), where a sigmoid is
    1/K, and have no weight decay (section 5.2). The sum over the classes is divided by the number of positives, as in
    the authors' code: one per sample. The method trains on the random stream in one stage.
    """

    mixes_labels = True
    parameters_without_decay = ("bias",)

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.class_weights = class_balanced_weights(counts, config.baselines.class_balanced_beta)

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        head = nn.Linear(in_features, num_classes)
        nn.init.constant_(head.bias, -math.log(max(1, num_classes - 1)))
        return head

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        gamma = self.config.baselines.cb_focal_gamma
        return {"loss_random": sigmoid_focal_loss(head(features), labels, self.class_weights, gamma)}


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
    """Return the mean over the samples of the weighted sigmoid focal loss, in float32 or wider.

    Args:
        logits: [b, K].
        labels: classes, [b].
        class_weights: the weight of a sample by its class, [K].
        gamma: γ, not negative.
    """
    logits = wide(logits)
    positive = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    toward_wrong = torch.where(positive, -logits, logits)
    # (1 - p)^γ as an exponential: a power of 1 - p would have an infinite gradient at p = 1 for γ < 1.
    focus = (gamma * F.logsigmoid(toward_wrong)).exp()
    loss = (focus * F.softplus(toward_wrong)).sum(1)
    return (class_weights[labels] * loss).mean()
