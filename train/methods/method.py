"""The interface of a method, with defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gistops.nn import ConstellationClassifier

from ..config import Config
from ..model.model import Model

#: Returns the features [n, d] of all training samples, without augmentation, and their classes [n].
TrainingFeatures = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage:
    """A number of epochs with one optimizer and one learning rate schedule."""

    name: str
    epochs: int


class Method:
    """A way to train a classifier: its head, stages, batches and loss.

    The trainer minimizes the sum of `losses()`, each multiplied by its coefficient in `loss_coefficients`.

    Args:
        config: the options of the run.
        counts: the number of training samples of each class, [K].
    """

    stages: list[Stage]
    loss_coefficients: dict[str, float]

    def __init__(self, config: Config, counts: Tensor) -> None:
        self.config, self.counts = config, counts
        self.backend = config.runtime.head_backend
        self.log_prior = config.method.prior_strength * log_prior(counts)

    def split_batch(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        """Return how a step's samples are split between the balanced and the random stream.

        Every method sees num_balanced + num_random samples per step.
        """
        raise NotImplementedError

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Return a new head for the first stage."""
        raise NotImplementedError

    def losses(self, head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        """Return the mean loss over the samples of each stream that the method uses, "loss_balanced" and "loss_random".

        The first `num_balanced` samples are those of the balanced stream.
        """
        raise NotImplementedError

    def begin_stage(self, stage: int, model: Model, training_features: TrainingFeatures) -> None:
        """Change the head for the next stage, counted from 0."""

    def end_epoch(self, model: Model, training_features: TrainingFeatures) -> None:
        """Update parameters that are not trained by gradients."""

    def alternative_scores(self, head: Any, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Return other scores [b, K] that the trained head offers besides its `logits`, by name; they are evaluated too."""
        return {}

    def describe(self, head: Any) -> dict[str, Any]:
        """Return properties of the head for the records, in plain types."""
        return {}


def log_prior(counts: Tensor) -> Tensor:
    """Return the logarithm of each class's fraction of the training samples, [K] float32."""
    return (counts / counts.sum()).log().float()


def describe_constellation(head: ConstellationClassifier) -> dict[str, Any]:
    """Return the temperature and the norms of the centers and displacements."""
    return {
        "tau_balanced": float(head.tau.detach()),
        "mean_center_norm": float(head.centers.detach().norm(dim=1).mean()),
        "displacement_norms": head.displacements.detach().norm(dim=1).tolist(),
    }
