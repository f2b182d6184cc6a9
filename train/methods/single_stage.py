"""The common part of methods with a single stage."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..config import Config
from .method import Method, Stage


class SingleStageMethod(Method):
    """A linear classifier that trains on one stream in one stage, with as many epochs as two stages have together.

    Subclasses define the loss, and may replace the head.
    """

    stream: Literal["balanced", "random"] = "random"

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        self.stages = [Stage("", config.optim.stage1_epochs + config.optim.stage2_epochs, self.stream)]
        self.loss_coefficients = {f"loss_{self.stream}": 1.0}

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes)
