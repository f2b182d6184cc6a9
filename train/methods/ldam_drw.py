"""LDAM loss with deferred re-weighting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier

from ..config import Config
from ..model.model import Model
from .class_weights import class_balanced_weights
from .method import describe_constellation
from .single_stage import SingleStageMethod

TEMPERATURE = 30.0  # s in the authors' code; the paper does not name it
LARGEST_MARGIN = 0.5  # max_m in the authors' code
BETA = 0.9999  # β of the class weights; the authors' code has one value for all data sets


class LdamDrw(SingleStageMethod):
    """LDAM with deferred re-weighting (Cao, Wei, Gaidon, Arechiga, Ma, NeurIPS 2019, equation 13 and algorithm 1).

        L = Σ weight_y CE(s, y) / Σ weight_y over the mini-batch,
        s_y = τ (cos(f, w_y) - C n_y^(-1/4)),  s_k = τ cos(f, w_k) for k ≠ y,    τ = 30, not trained
        weight_k = 1 at first; in the last fifth of the epochs ∝ (1 - β) / (1 - β^n_k), β = 0.9999

    C makes the largest margin 0.5. The method trains on the random stream in one stage. The learning rate follows --schedule
    throughout. (The authors lower it where the weights change, at epoch 160 of 200.)

    The mean is weighted, as in the authors' code, so the loss depends on how a mini-batch is split into micro-batches.
    """

    shards_classes = True
    # The weights of a micro-batch have the same sum for both labels of mixed samples, which are permutations of each other.
    mixes_labels = True

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.margins = ldam_margins(counts)
        self.deferred_weights = class_balanced_weights(counts, BETA)
        self.class_weights = torch.ones_like(self.deferred_weights)

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        head = ConstellationClassifier(in_features, num_classes, 0, tau=TEMPERATURE, backend=self.backend)
        head.raw_tau.requires_grad_(False)
        return head

    def losses(
        self, head: ConstellationClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        loss = head.loss(
            features, labels, weight=self.class_weights, margin=self.margins, margin_kind="cosine"
        )
        return {"loss_random": loss}

    def begin_epoch(self, stage: int, epoch: int, model: Model) -> None:
        """Set the class weights of the epoch, in-place: a CUDA graph reads them from a fixed address."""
        if epoch < first_deferred_epoch(self.stages[stage].epochs):
            self.class_weights.fill_(1)
        else:
            self.class_weights.copy_(self.deferred_weights)

    def describe(self, head: ConstellationClassifier) -> dict[str, Any]:
        return describe_constellation(head)


def ldam_margins(counts: Tensor) -> Tensor:
    """Return the margins C n_k^(-1/4), [K] float32; C makes the largest one `LARGEST_MARGIN`."""
    margins = counts.double() ** -0.25
    return (margins * (LARGEST_MARGIN / margins.max())).float()


def first_deferred_epoch(epochs: int) -> int:
    """Return the first epoch with class weights, counted from 0: 160 of 200, as in the authors' code."""
    return epochs * 4 // 5
