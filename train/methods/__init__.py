"""What is trained: for each method its head, its stages, what it draws, its loss, and how its scores may be read.

The rows of the paper's Table 3, and what is in use today instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gistops
from gistops.nn import ConstellationClassifier, GistClassifier

from ..config import Config
from . import residual_directions as structure
from .residual_directions import Sample

Scores = dict[str, Tensor]  # what a reading is called -> logits [b, K]


@dataclass(frozen=True)
class Stage:
    """Epochs under one optimiser and one schedule."""

    name: str
    epochs: int


class Method(Protocol):
    """One way to train a head on a backbone's features."""

    stages: list[Stage]
    #: By what each of its losses counts in the one to minimise.
    weights: dict[str, float]

    def draws(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        """Of a step's images, which every method sees as many of: from the balanced and from the random stream."""

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        """A new head, as the first stage has it."""

    def begin_stage(self, stage: int, head: Any, sample: Sample) -> None:
        """Change the head from the stage before into that of `stage`."""

    def end_epoch(self, head: Any, sample: Sample) -> None:
        """Change what is not trained by gradients."""

    def losses(self, head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        """Means over each stream's samples, loss_balanced and loss_random; the balanced stream's samples come first."""

    def readings(self, head: Any, features: Tensor, logits: Tensor) -> Scores:
        """Logits that the trained head could also be used with, beside its own `logits`."""

    def describe(self, head: Any) -> dict[str, Any]:
        """What is worth writing down of the head, in plain types."""


class SoftmaxClassifier:
    """One stream, the random one, and a linear or cosine head; with a prior, its log is added to the logits in training.

    That is logit adjustment (Menon et al., ICLR 2021), and with a strength of 1 balanced softmax (Ren et al., NeurIPS
    2020). Without, the prior may be taken off afterwards.
    """

    def __init__(self, config: Config, counts: Tensor, *, cosine: bool = False, prior: bool = False) -> None:
        self.cosine, self.prior, self.backend = cosine, prior, config.runtime.head_backend
        self.log_prior = config.method.prior_strength * log_prior(counts)
        self.stages = [Stage("", config.optim.stage1_epochs + config.optim.stage2_epochs)]
        self.weights = {"loss_random": 1.0}

    def draws(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        return 0, num_balanced + num_random

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        if self.cosine:
            return ConstellationClassifier(in_features, num_classes, 0, backend=self.backend)
        return nn.Linear(in_features, num_classes)

    def begin_stage(self, stage: int, head: nn.Module, sample: Sample) -> None:
        pass

    def end_epoch(self, head: nn.Module, sample: Sample) -> None:
        pass

    def losses(
        self, head: nn.Module, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        bias = self.log_prior if self.prior else None
        if isinstance(head, ConstellationClassifier):
            return {"loss_random": head.loss(features, labels, class_bias=bias)}
        logits = head(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss_random": F.cross_entropy(logits if bias is None else logits + bias, labels)}

    def readings(self, head: nn.Module, features: Tensor, logits: Tensor) -> Scores:
        return {} if self.prior else {"adjusted afterwards": logits - self.log_prior}

    def describe(self, head: nn.Module) -> dict[str, Any]:
        return describe_constellation(head) if isinstance(head, ConstellationClassifier) else {}


class OneHead:
    """One constellation. On the balanced stream alone; or on both, δ learned from the random one (w = v)."""

    def __init__(self, config: Config, counts: Tensor, *, displacements: bool, both: bool = False) -> None:
        self.config, self.counts, self.both = config, counts, both
        self.backend = config.runtime.head_backend
        self.num_displacements = config.method.num_displacements if displacements else 0
        self.stages = two_stages(config)
        self.weights = two_weights(config) if both else {"loss_balanced": 1.0}

    def draws(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        return (num_balanced, num_random) if self.both else (num_balanced + num_random, 0)

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        return ConstellationClassifier(in_features, num_classes, 0, backend=self.backend)

    def begin_stage(self, stage: int, head: ConstellationClassifier, sample: Sample) -> None:
        if stage == 1 and self.num_displacements and self.stages[1].epochs:  # or they would stay noise
            structure.begin(head, self.config, self.counts, sample)

    def end_epoch(self, head: ConstellationClassifier, sample: Sample) -> None:
        if head.num_displacements:
            structure.follow(head, self.config, self.counts, sample)

    def losses(
        self, head: ConstellationClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        if not self.both:
            return {"loss_balanced": head.loss(features, labels)}
        (f_c, f_r), (y_c, y_r) = features.tensor_split([num_balanced]), labels.tensor_split([num_balanced])
        constellation = head.centers, head.displacements.detach(), head.tau
        balanced = gistops.constellation_cross_entropy(f_c, *constellation, y_c, backend=self.backend)
        random = head.loss(f_r, y_r)
        assert isinstance(balanced, Tensor)
        return {"loss_balanced": balanced, "loss_random": random}

    def readings(self, head: ConstellationClassifier, features: Tensor, logits: Tensor) -> Scores:
        return centers_alone(head, features)

    def describe(self, head: ConstellationClassifier) -> dict[str, Any]:
        return describe_constellation(head)


class Gist:
    """GistNet: L = L_random + λ L_balanced; cosine heads in stage 1, with displacements in stage 2."""

    def __init__(
        self,
        config: Config,
        counts: Tensor,
        *,
        displacements: bool = True,
        transform: Literal["translation", "rotation", "mlp"] = "translation",
    ) -> None:
        self.config, self.counts, self.transform = config, counts, transform
        self.backend = config.runtime.head_backend
        self.num_displacements = config.method.num_displacements if displacements else 0
        self.log_prior = config.method.prior_strength * log_prior(counts)
        self.stages = two_stages(config)
        self.weights = two_weights(config)

    def draws(self, num_balanced: int, num_random: int) -> tuple[int, int]:
        return num_balanced, num_random

    def head(self, in_features: int, num_classes: int) -> nn.Module:
        return GistClassifier(
            in_features, num_classes, num_displacements=0, transform=self.transform, backend=self.backend
        )

    def begin_stage(self, stage: int, head: GistClassifier, sample: Sample) -> None:
        if stage == 1 and self.num_displacements and self.stages[1].epochs:  # or they would stay noise
            structure.begin(head, self.config, self.counts, sample, transfer=True)

    def end_epoch(self, head: GistClassifier, sample: Sample) -> None:
        if head.num_displacements:
            structure.follow(head, self.config, self.counts, sample)

    def losses(
        self, head: GistClassifier, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        (f_c, f_r), (y_c, y_r) = features.tensor_split([num_balanced]), labels.tensor_split([num_balanced])
        balanced, random = head.losses(f_c, y_c, f_r, y_r)
        return {"loss_balanced": balanced, "loss_random": random}

    def readings(self, head: GistClassifier, features: Tensor, logits: Tensor) -> Scores:
        adjusted = head.random_logits(features) - self.log_prior
        both = logits.log_softmax(1) + adjusted.log_softmax(1)
        return {"random head, adjusted": adjusted, "both heads": both} | centers_alone(head, features)

    def describe(self, head: GistClassifier) -> dict[str, Any]:
        return describe_constellation(head) | {"tau_random": float(head.random_tau.detach())}


def two_weights(config: Config) -> dict[str, float]:
    """L = L_random + λ L_balanced."""
    return {"loss_balanced": config.method.balanced_loss_weight, "loss_random": 1.0}


def two_stages(config: Config) -> list[Stage]:
    return [Stage("stage 1", config.optim.stage1_epochs), Stage("stage 2", config.optim.stage2_epochs)]


def log_prior(counts: Tensor) -> Tensor:
    """log of each class's share of the training samples, [K] float32."""
    return (counts / counts.sum()).log().float()


def centers_alone(head: ConstellationClassifier, features: Tensor) -> Scores:
    """What the trained head says without its displacements, if it has any: the difference is what they decide."""
    if not head.num_displacements:
        return {}
    no_displacements = head.displacements[:0]
    logits = gistops.constellation_logits(
        features, head.centers, no_displacements, head.tau, backend=head.backend
    )
    assert isinstance(logits, Tensor)
    return {"centres alone": logits}


def describe_constellation(head: ConstellationClassifier) -> dict[str, Any]:
    """Temperature, and lengths of centres and displacements."""
    return {
        "tau_balanced": float(head.tau.detach()),
        "mean_center_norm": float(head.centers.detach().norm(dim=1).mean()),
        "displacement_norms": head.displacements.detach().norm(dim=1).tolist(),
    }


METHODS: dict[str, Callable[[Config, Tensor], Method]] = {
    "gist": Gist,
    "plain": SoftmaxClassifier,
    "cos-cb": functools.partial(OneHead, displacements=False),
    "cos-cs-cb": functools.partial(OneHead, displacements=True),
    "cos-gist": functools.partial(Gist, displacements=False),
    "gist-combined": functools.partial(OneHead, displacements=True, both=True),
    "gist-rotation": functools.partial(Gist, transform="rotation"),
    "gist-mlp": functools.partial(Gist, transform="mlp"),
    "balanced-softmax": functools.partial(SoftmaxClassifier, prior=True),
    "cos-balanced-softmax": functools.partial(SoftmaxClassifier, cosine=True, prior=True),
}

#: Methods that are another one in all but their second stage, and that other one.
FIRST_STAGES = {
    "cos-gist": "cos-gist",
    "gist": "cos-gist",
    "gist-rotation": "cos-gist",
    "gist-mlp": "cos-gist",
    "cos-cb": "cos-cb",
    "cos-cs-cb": "cos-cb",
}

#: What reports call them; in the paper's Table 3 where it has them.
TITLES = {
    "gist": "GistNet (COS+CS+GIST)",
    "plain": "plain softmax",
    "cos-cb": "COS+CB",
    "cos-cs-cb": "COS+CS+CB",
    "cos-gist": "COS+GIST",
    "gist-combined": "w/v combined",
    "gist-rotation": "GistNet, rotation",
    "gist-mlp": "GistNet, MLP",
    "balanced-softmax": "balanced softmax",
    "cos-balanced-softmax": "cosine balanced softmax",
}
