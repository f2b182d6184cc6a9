"""Classifier re-training."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import Config
from ..model.model import Model
from .decoupled import Decoupled
from .method import StageData


class ClassifierRetraining(Decoupled):
    """A new linear classifier on the features of `plain` (Kang et al., ICLR 2020, section 4, "cRT").

        L = CE(w_k · f + b_k, y) on the balanced stream, with respect to w and b alone

    The classifier starts at random and trains for --crt-epochs with the optimizer of the first stage.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts, config.baselines.crt_epochs)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        super().begin_stage(stage, model, data)
        if stage == 1:
            assert isinstance(model.head, nn.Linear)
            head = self.make_head(model.head.in_features, model.head.out_features)
            model.head = head.to(model.head.weight)
