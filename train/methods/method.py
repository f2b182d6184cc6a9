"""The interface of a method, with defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier

from ..config import Config
from ..model.model import Model
from ..model.prior import log_prior
from ..model.sharded_head import local, mean_norm


@dataclass(frozen=True)
class Stage:
    """A number of epochs with one optimizer and one learning rate schedule.

    Args:
        name: the name in progress messages; empty for the only stage of a method.
        epochs: the number of epochs.
        streams: the streams of samples. Each step has as many samples as a step of both streams. shared: random samples,
            each of which is in both streams.
        classes: the classes whose samples are used, [K] bool; None for all.
        frozen_features: keep the weights and the statistics of everything before the head.
    """

    name: str
    epochs: int
    streams: Literal["both", "balanced", "random", "shared"]
    classes: Tensor | None = None
    frozen_features: bool = False

    def split(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        """Return the samples per step from the balanced and the random stream, for a step that could have both."""
        total = num_balanced + num_random
        sizes = {"both": (num_balanced, num_random), "balanced": (total, 0)}
        return sizes.get(self.streams, (0, total))

    def same_samples(self, other: Stage) -> bool:
        """Return whether both stages draw from the same streams and classes, so that one continues the other's draws."""
        if self.streams != other.streams or (self.classes is None) != (other.classes is None):
            return False
        return self.classes is None or other.classes is None or torch.equal(self.classes, other.classes)


#: Features [n, d] of unaugmented samples, and their classes [n].
LabeledFeatures = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StageData:
    """The features that a method may compute between epochs and stages.

    Args:
        training: returns the features of all training samples.
        validation: returns the features of the validation split; None if the data has none.
    """

    training: Callable[[], LabeledFeatures]
    validation: Callable[[], LabeledFeatures | None]


class Method:
    """A way to train a classifier: its head, stages, batches and loss.

    The trainer minimizes the sum of `losses()`, each multiplied by its coefficient in `loss_coefficients`. A resumed run
    has the parameters and buffers of the model, and calls `begin_stage` and `begin_epoch` again: a method keeps no other state.

    Args:
        config: the options of the run.
        counts: the number of training samples of each class, [K].
    """

    stages: list[Stage]
    loss_coefficients: dict[str, float]
    #: Names of the head's parameters without weight decay, beside the temperatures.
    parameters_without_decay: tuple[str, ...] = ()
    #: Whether --shard-classes may shard the head: the method reads neither logits of all classes nor centers of all.
    shards_classes = False
    #: e, if softmax of the logits estimates the probabilities of the classes where they are as frequent as π^e / Σ π^e, for the
    #: frequencies π of the training samples: 1 after a cross-entropy on random samples, 0 after one on class-balanced samples.
    #: None if the loss or the classifier is not of this kind, so that no prior is known.
    prior_exponent: float | None = None
    #: Whether --label-smoothing applies: the loss is a cross-entropy of the labels.
    smooths_labels = False
    #: Whether --mixup and --cutmix apply: the loss is a mean over samples, and a sample's part depends on its label alone.
    mixes_labels = False
    #: Whether a CUDA graph can capture a step: no shape depends on values.
    capturable = True

    def __init__(self, config: Config, counts: Tensor) -> None:
        self.config, self.counts = config, counts
        self.backend = config.runtime.head_backend
        self.label_smoothing = config.method.label_smoothing
        self.log_prior = config.method.prior_strength * log_prior(counts)

    def to(self, device: torch.device) -> None:
        """Move the method's tensors, such as the log prior, to the device of its head."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Return a new head for the first stage."""
        raise NotImplementedError

    def losses(self, head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        """Return the mean loss over the samples of each stream that the method uses, "loss_balanced" and "loss_random".

        The first `num_balanced` samples are those of the balanced stream.
        """
        raise NotImplementedError

    def training_losses(
        self, model: Model, samples: Tensor, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        """Return `losses()`. Methods whose losses need more than the features of the augmented samples override it."""
        return self.losses(model.head, features, labels, num_balanced)

    def restructure(self, model: Model) -> None:
        """Give a model of the first stage the modules of the last stage, with any values.

        The estimate of memory calls it with a model on the meta device, the method itself where a stage begins.
        """

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        """Change the model for the next stage, counted from 0. A resumed run replaces the values, not the structure."""

    def begin_epoch(self, stage: int, epoch: int, model: Model) -> None:
        """Prepare an epoch, counted from 0 in its stage. A resumed run calls it again within an epoch.

        Tensors are changed in place, because a CUDA graph reads them.
        """

    def end_epoch(self, model: Model, data: StageData) -> None:
        """Update parameters that are not trained by gradients."""

    def finish(self, model: Model, data: StageData) -> None:
        """Change the model after the last stage, before it is evaluated and saved."""

    def reads_training_features(self) -> bool:
        """Return whether the method calls `StageData.training`, for the estimate of memory."""
        return False

    def alternative_scores(self, head: Any, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Return other scores [b, K] that the trained head offers besides its `logits`, by name; they are evaluated too."""
        return {}

    def alternative_predictions(self, head: Any, features: Tensor) -> dict[str, Tensor]:
        """Return the classes [b] with the highest `alternative_scores`, of a sharded head, by name."""
        return {}

    def describe(self, head: Any) -> dict[str, Any]:
        """Return properties of the head for the records, in plain types."""
        return {}


def describe_constellation(head: ConstellationClassifier) -> dict[str, Any]:
    """Return the temperature and the norms of the centers and displacements."""
    return {
        "tau_balanced": float(local(head.tau)),
        "mean_center_norm": float(mean_norm(head.centers)),
        "displacement_norms": local(head.displacements).norm(dim=1).tolist(),
    }
