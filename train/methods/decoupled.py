"""The common part of the decoupled methods: a linear classifier for the features that `plain` has learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Config
from ..model.model import Model
from .method import Stage, StageData
from .softmax import SoftmaxClassifier


class Decoupled(SoftmaxClassifier):
    """A method that replaces the classifier of `plain` after its training (Kang et al., ICLR 2020).

    The first stage is the whole training of `plain`: a linear softmax classifier on the random stream. A second stage, if
    there is one, trains a classifier on the balanced stream, with the softmax cross-entropy, while the weights and the
    statistics of the network before it stay as they are. (In the authors' code, batch normalization keeps collecting
    statistics.) The result is a linear classifier.

    Args:
        config: the options of the run.
        counts: the number of training samples of each class, [K].
        classifier_epochs: the epochs of the second stage; 0 for none.
    """

    is_plain = False  # whether the head is the classifier of `plain`, in training

    def __init__(self, config: Config, counts: Tensor, classifier_epochs: int = 0) -> None:
        super().__init__(config, counts)
        self.stages = [Stage("stage 1", self.stages[0].epochs, "random")]
        self.prior_exponent = (
            0.0 if classifier_epochs else None
        )  # trained on the balanced stream, or not by a loss
        if classifier_epochs:
            self.stages.append(Stage("stage 2", classifier_epochs, "balanced", frozen_features=True))
            self.loss_coefficients["loss_balanced"] = 1.0

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        loss = super().losses(head, features, labels, num_balanced)["loss_random"]
        return {"loss_balanced" if num_balanced else "loss_random": loss}

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        self.is_plain = stage == 0

    def alternative_scores(self, head: nn.Module, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Return the scores of `plain` in the first stage, whose records several methods share; none for other heads."""
        return super().alternative_scores(head, features, logits) if self.is_plain else {}


@torch.no_grad()
def set_classifier(model: Model, weight: Tensor, bias: Tensor) -> None:
    """Replace the head by a linear classifier with the weights [K, d] and the biases [K].

    The dtype and the device are those of the head before.
    """
    head = nn.Linear(weight.shape[1], len(weight)).to(next(model.head.parameters()))
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    model.head = head
