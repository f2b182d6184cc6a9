"""Learnable weight scaling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Config
from ..model.model import Model
from .decoupled import Decoupled, set_classifier
from .method import StageData

EPOCHS = 5  # of the second stage, on all data sets of the paper


class WeightScaling(Decoupled):
    """One learned scale per class for the classifier of `plain` (Kang et al., ICLR 2020, section 4, "LWS").

        L = CE(a_k (w_k · f + b_k), y) on the balanced stream, with respect to a alone

    a starts at 1. As in the authors' code, a multiplies the biases too, which the paper leaves out, and has weight decay.
    The scaled weights and biases are the final classifier.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts, EPOCHS)

    def restructure(self, model: Model) -> None:
        assert isinstance(model.head, nn.Linear)
        model.head = ScaledLinear(model.head)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        super().begin_stage(stage, model, data)
        if stage == 1:
            self.restructure(model)

    @torch.no_grad()
    def finish(self, model: Model, data: StageData) -> None:
        assert isinstance(model.head, ScaledLinear)
        set_classifier(model, *model.head.scaled())


class ScaledLinear(nn.Module):
    """A linear classifier whose weights and biases are fixed and whose logits have a learned scale per class.

    Args:
        classifier: the linear classifier.
    """

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.scales = nn.Parameter(torch.ones_like(classifier.bias))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.scales * self.classifier(features)
        return logits

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return the scaled weights [K, d] and biases [K]."""
        return self.scales[:, None] * self.classifier.weight, self.scales * self.classifier.bias
