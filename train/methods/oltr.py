"""OLTR: a memory of class centroids for features of few-shot classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..model.memory_head import MemoryHead
from ..model.model import Model
from ..model.precision import wide
from .class_means import class_means
from .method import Method, Stage, StageData

CENTROID_WEIGHT = 0.01  # λ: the authors' configurations for ImageNet-LT and Places-LT
REPEL_WEIGHT = 0.01  # in the authors' code; the paper has no value
REPEL_MARGIN = 10.0


class Oltr(Method):
    """Open long-tailed recognition (Liu, Miao, Zhan, Wang, Gong, Yu, CVPR 2019): plain softmax, then a `MemoryHead`.

        stage 1, random stream:    L = CE(W f + b, y)
        stage 2, balanced stream:  L = CE(s, y) + λ L_centroid,    s the scores of the `MemoryHead`

    The head starts with the class means of the features as centroids and with the first stage's classifier as its
    hallucinator. `centroid_loss` is the mean over the samples of a micro-batch, except for the gradient of the centroids. The
    modulated attention of the paper belongs to the backbone and is left out.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.stages = [
            Stage("stage 1", config.optim.stage1_epochs, "random"),
            Stage("stage 2", config.optim.stage2_epochs, "balanced"),
        ]
        self.loss_coefficients = {"loss_balanced": 1.0, "loss_random": 1.0}
        self.prior_exponent = 0.0 if config.optim.stage2_epochs else 1.0

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes)

    def restructure(self, model: Model) -> None:
        if self.stages[1].epochs:
            linear = model.head
            assert isinstance(linear, nn.Linear)
            head = MemoryHead(linear.in_features, linear.out_features, self.backend)
            model.head = head.to(linear.weight)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        if stage == 0:
            return
        linear = model.head
        self.restructure(model)
        if isinstance(model.head, MemoryHead):
            model.head.hallucinator.load_state_dict(linear.state_dict())
            model.head.centroids.data.copy_(class_means(*data.training(), len(self.counts)))

    def reads_training_features(self) -> bool:
        return self.stages[1].epochs > 0

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        if not isinstance(head, MemoryHead):
            logits = head(features)
            logits = wide(logits)
            return {"loss_random": F.cross_entropy(logits, labels)}
        with torch.autocast(
            features.device.type, enabled=False
        ):  # half precision is too coarse for distances
            features = wide(features)
            loss = F.cross_entropy(head(features), labels)
            return {"loss_balanced": loss + CENTROID_WEIGHT * centroid_loss(features, labels, head.centroids)}


def centroid_loss(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return the loss that attracts features to the centroids of their classes and repels them from the others.

        L_centroid = 1/(2B) Σ_i ‖f_i − c_{y_i}‖²  +  .01 · max(0, 10 − 1/(B K) Σ_i Σ_{k ≠ y_i} ‖f_i − c_k‖²)

    In the first term, the gradient of centroid c_k is not this formula's but, as in the authors' code and independent of λ,
    Σ_{i: y_i = k} (c_k − f_i) / (B (1 + n_k)), with n_k samples of class k in the micro-batch.

    Args:
        features: f, [B, d].
        labels: y, [B].
        centroids: C, [K, d].
    """
    own = F.embedding(labels, centroids)
    samples_of_class = (labels[:, None] == labels).sum(1, keepdim=True)
    slowed = own.detach() + (own - own.detach()) / (1 + samples_of_class) / CENTROID_WEIGHT
    attract = (features - slowed).square().sum(1).mean() / 2
    # The sum over all pairs of samples and centroids, by the distances from the centroids' mean: without a [B, K] matrix and
    # without the cancellation of large terms.
    mean = centroids.mean(0)
    pairs = (features - mean).square().sum(1).mean() + (centroids - mean).square().sum(1).mean()
    others = pairs - (features - own).square().sum(1).mean() / len(centroids)
    return attract + REPEL_WEIGHT * F.relu(REPEL_MARGIN - others)
