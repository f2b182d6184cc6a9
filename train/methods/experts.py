"""Experts for groups of classes, and what a student learns from them: the parts of `lfme`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.precision import wide

#: Values of the authors' configuration for ImageNet-LT (config/ImageNet_LT/LFME.py): T, and the share of the expert's
#: accuracy at which the distillation begins to fade.
TEMPERATURE = 2.0
DECAY_THRESHOLD = 0.3
#: The share of the student's epochs after which hard samples count as much as easy samples. The code has half of them.
CURRICULUM_SHARE = 0.5


class ExpertHead(nn.Linear):
    """A linear classifier of the classes in a group.

    Args:
        in_features: the dimension d of the features.
        group: the classes, [K] bool; C of them are True.
    """

    group: Tensor  # [K] bool
    classes: Tensor  # their indices, [C]
    positions: Tensor  # the position of each class in `classes`, [K]; 0 for classes outside of the group
    accuracy: Tensor  # the mean accuracy over the classes, []; 0 until the expert is trained
    least: Tensor  # the least probability that a training sample's own class gets, for each class, [C]
    most: Tensor  # the largest such probability, [C]

    def __init__(self, in_features: int, group: Tensor) -> None:
        classes = group.nonzero().flatten()
        super().__init__(in_features, len(classes))
        self.register_buffer("group", group.clone())
        self.register_buffer("classes", classes)
        self.register_buffer("positions", (group.long().cumsum(0) - 1) * group)
        self.register_buffer("accuracy", torch.zeros(()))
        self.register_buffer("least", torch.ones(len(classes)))
        self.register_buffer("most", torch.ones(len(classes)))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of the group's classes, [b, C], in float32 (float64 for float64)."""
        return wide(super().forward(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return scores for all K classes, [b, K]: −∞ outside of the group."""
        logits = self.logits(features)
        scores = logits.new_full((len(logits), len(self.group)), -torch.inf)
        return scores.index_copy(1, self.classes, logits)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over samples of the group's classes."""
        return F.cross_entropy(self.logits(features), self.positions[labels])

    def easiness(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the position of each sample between the hardest (0) and the easiest (1) training sample of its class, [b].

        Args:
            logits: the expert's logits, [b, C].
            labels: the samples' classes, [b]. The value of a sample outside of the group has no meaning.
        """
        positions = self.positions[labels]
        probabilities = logits.softmax(1).gather(1, positions[:, None])[:, 0]
        least, most = self.least[positions], self.most[positions]
        position = (probabilities - least) / (most - least)
        return torch.where(
            most > least, position.clamp(0, 1), 1.0
        )  # equal samples, such as a single one, are easy

    @torch.no_grad()
    def set_confidences(self, features: Tensor, labels: Tensor, chunk: int) -> None:
        """Set `least` and `most`.

        Args:
            features: the features of training samples, [n, d].
            labels: their classes, [n]; samples outside of the group are left out.
            chunk: the number of samples whose logits are held at once.
        """
        self.least.fill_(1)
        self.most.fill_(0)
        for rows in self.group[labels].nonzero().flatten().split(chunk):
            positions = self.positions[labels[rows]]
            probabilities = self.logits(features[rows]).softmax(1).gather(1, positions[:, None])[:, 0]
            self.least.scatter_reduce_(0, positions, probabilities.to(self.least), "amin")
            self.most.scatter_reduce_(0, positions, probabilities.to(self.most), "amax")


class Expert(nn.Module):
    """A copy of a trained network with an `ExpertHead`, without gradients.

    Args:
        backbone: the backbone.
        center: the layer between the backbone and the head.
        head: the head.
    """

    head: ExpertHead

    def __init__(self, backbone: nn.Module, center: nn.Module, head: ExpertHead) -> None:
        super().__init__()
        self.backbone, self.center, self.head = copy.deepcopy((backbone, center, head))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the group's classes, [b, C], for normalized samples."""
        return self.head.logits(self.center(self.backbone(x)))


class Experts(nn.Module):
    """All experts, and the state of the student's schedules.

    Args:
        floors: the least weight of a sample of each class at the start of the student's training, [K].
        num_experts: the number of experts in the end; they are appended to `experts` as they are trained.
    """

    weights: Tensor  # a_e, the weight of the distillation from each expert, [E]
    progress: Tensor  # the progress of the curriculum, []
    floors: Tensor

    def __init__(self, floors: Tensor, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.register_buffer("floors", floors.float())
        self.register_buffer("weights", torch.ones(num_experts))
        self.register_buffer("progress", torch.zeros(()))

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)  # type: ignore[arg-type]

    @torch.no_grad()
    def logits(self, x: Tensor) -> list[Tensor]:
        """Return the logits [b, C] of each expert for normalized samples."""
        return [expert(x) for expert in self]

    @torch.no_grad()
    def instance_weights(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the weight of each sample by the curriculum, [b].

        Args:
            logits: the logits of each expert, [b, C] each.
            labels: the samples' classes, [b].
        """
        floors = self.floors[labels]
        start = torch.ones_like(floors)  # the weight at the start
        for expert, teacher in zip(self, logits, strict=True):
            easiness = expert.head.easiness(teacher, labels)
            start = torch.where(expert.head.group[labels], floors + (1 - floors) * easiness, start)
        return start + (1 - start) * self.progress

    def loss(self, logits: Tensor, expert_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the student's mean loss over the samples.

        Args:
            logits: the student's logits, [b, K].
            expert_logits: the logits of each expert, [b, C] each.
            labels: the samples' classes, [b].
        """
        scaled = wide(logits) * self.instance_weights(expert_logits, labels)[:, None]
        loss = F.cross_entropy(scaled, labels)
        for weight, expert, teacher in zip(self.weights, self, expert_logits, strict=True):
            loss = loss + weight * distillation_loss(scaled.index_select(1, expert.head.classes), teacher)
        return loss


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over samples.

    The authors' code does not multiply by T², as Hinton et al. do.

    Args:
        student: the student's logits of a group's classes, [b, C].
        teacher: the expert's logits, [b, C].
    """
    student_log, teacher_log = ((logits / TEMPERATURE).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def distillation_weight(student_accuracy: Tensor, expert_accuracy: Tensor) -> Tensor:
    """Return a_e: 1 up to DECAY_THRESHOLD of the expert's accuracy, then linearly down to 0 at the expert's accuracy.

    It rises again if the student's accuracy falls. An expert that is never right has weight 0.
    """
    tiny = torch.finfo(expert_accuracy.dtype).tiny
    gap = (expert_accuracy - student_accuracy) / expert_accuracy.clamp(min=tiny)
    return (gap / (1 - DECAY_THRESHOLD)).clamp(0, 1)
