"""Softmax classifiers: linear or cosine, with or without the log prior in the loss."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier

from ..config import Config
from ..model.model import Model
from ..model.precision import wide
from .class_means import start_from_class_means
from .method import StageData, describe_constellation
from .single_stage import SingleStageMethod


class SoftmaxClassifier(SingleStageMethod):
    """A softmax classifier on the random stream, trained in one stage.

        L = CE(s + c · log π, y),    s = w_k · f + b_k,  or  τ cos(f, w_k) with `cosine`

    π_k is class k's fraction of the training samples. With `prior` c is --prior-strength: logit adjustment (Menon et al.,
    ICLR 2021), and for c = 1 balanced softmax (Ren et al., NeurIPS 2020). Without it c is 0, and the log prior may be
    subtracted after training.
    """

    smooths_labels = True
    mixes_labels = True

    def __init__(self, config: Config, counts: Tensor, *, cosine: bool = False, prior: bool = False) -> None:
        super().__init__(config, counts)
        self.cosine, self.prior = cosine, prior
        self.shards_classes = cosine
        # softmax(s + c log π) estimates the probabilities under π, so that softmax(s) does under π^(1 - c).
        self.prior_exponent = 1 - config.method.prior_strength if prior else 1.0

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        if self.cosine:
            return ConstellationClassifier(in_features, num_classes, 0, backend=self.backend)
        return super().make_head(in_features, num_classes)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        if isinstance(model.head, ConstellationClassifier) and self.reads_training_features():
            start_from_class_means([model.head.centers], model, data)

    def reads_training_features(self) -> bool:
        return self.cosine and self.config.method.center_init == "means"

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        bias = self.log_prior if self.prior else None
        if isinstance(head, ConstellationClassifier):
            loss = head.loss(features, labels, class_bias=bias, label_smoothing=self.label_smoothing)
            return {"loss_random": loss}
        logits = wide(head(features))
        logits = logits if bias is None else logits + bias
        return {"loss_random": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}

    def alternative_scores(self, head: nn.Module, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        return {} if self.prior else {"adjusted afterwards": logits - self.log_prior}

    def describe(self, head: nn.Module) -> dict[str, Any]:
        return describe_constellation(head) if isinstance(head, ConstellationClassifier) else {}
