"""What is trained: for each method its head, its stages, what it draws and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from gistops.nn import GistClassifier

from .config import Config


@dataclass(frozen=True)
class Stage:
    """Epochs under one optimiser and one schedule."""

    name: str
    epochs: int


class Method(Protocol):
    """One way to train a head on a backbone's features."""

    stages: list[Stage]
    balanced: bool  # whether a step draws a class-balanced batch; if not, the random stream gives as many images more

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        """A new head, as the first stage has it."""

    def begin_stage(self, stage: int, head: Any) -> None:
        """Change the head from the stage before into that of `stage`."""

    def losses(self, head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        """The loss to minimise, as 'loss', and its parts; the balanced batch's samples come first."""

    def describe(self, head: Any) -> dict[str, Any]:
        """What is worth writing down of the head, in plain types."""


class Plain:
    """A linear head under cross-entropy, on the random stream alone."""

    balanced = False

    def __init__(self, config: Config) -> None:
        self.stages = [Stage("", config.stage1_epochs + config.stage2_epochs)]

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_features, num_classes)

    def begin_stage(self, stage: int, head: nn.Linear) -> None:
        pass

    def losses(
        self, head: nn.Linear, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(head(features), labels)}

    def describe(self, head: nn.Linear) -> dict[str, Any]:
        return {}


class Gist:
    """GistNet: L = L_random + λ L_balanced; cosine heads in stage 1, with displacements in stage 2."""

    balanced = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stages = [Stage("stage 1", config.stage1_epochs), Stage("stage 2", config.stage2_epochs)]

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        return GistClassifier(in_features, num_classes, num_displacements=0)

    def begin_stage(self, stage: int, head: GistClassifier) -> None:
        if stage == 1 and self.config.num_displacements:
            head.add_displacements(self.config.num_displacements)

    def losses(
        self, head: GistClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        (f_c, f_r), (y_c, y_r) = features.tensor_split([num_balanced]), labels.tensor_split([num_balanced])
        balanced, random = head.losses(f_c, y_c, f_r, y_r)
        loss = random + self.config.balanced_loss_weight * balanced
        return {"loss": loss, "loss_balanced": balanced, "loss_random": random}

    def describe(self, head: GistClassifier) -> dict[str, Any]:
        return {
            "tau_balanced": float(head.tau.detach()),
            "tau_random": float(head.random_tau.detach()),
            "mean_center_norm": float(head.centers.detach().norm(dim=1).mean()),
            "displacement_norms": head.displacements.detach().norm(dim=1).tolist(),
        }


METHODS: dict[str, Callable[[Config], Method]] = {"gist": Gist, "plain": Plain}
