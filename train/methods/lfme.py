"""Learning from multiple experts: distillation from networks for the many-, medium- and few-shot classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..model.fresh import reset_network
from ..model.model import Model
from ..model.precision import wide
from ..shot_groups import split_classes
from .experts import CURRICULUM_SHARE, Expert, ExpertHead, Experts, distillation_weight
from .method import LabeledFeatures, Method, Stage, StageData


class Lfme(Method):
    """LFME (Xiang, Ding, Han, ECCV 2020), as the authors' code (github.com/xiangly55/LFME) trains it on ImageNet-LT.

    An expert per group of classes (many-, medium-, few-shot by --split-rule) trains on the group's samples with softmax
    cross-entropy. Then the student trains on all samples, sampled class-balanced, with

        L   = CE(z', y) + Σ_e a_e KL(softmax(t_e / T) ‖ softmax(z'_e / T)),    z' = s z,  T = 2
        a_e = 1 up to A = 0.3 A_e,    (1 − A / A_e) / (1 − 0.3) up to A = A_e,    0 above
        s   = w + (1 − w) · epoch / (epochs / 2),    w = r + (1 − r) · (p − p_min) / (p_max − p_min)

    z are the student's logits, z_e those of expert e's classes, t_e the expert's logits. A and A_e are the mean accuracies
    of the student and the expert over the expert's classes. The student chooses among all classes, the expert among its
    classes. p is the probability that the expert of a sample's class gives that class; p_min and p_max are its extremes over
    the class's training samples. r is the mean number of samples per class of the smallest group divided by that of the
    sample's group.

    The code differs from the paper, and is followed here: s multiplies the logits instead of the loss, so that it also
    softens the distillation; s reaches 1 at half of the epochs and exceeds 1 afterwards; the student's samples are
    class-balanced. Here p is that of the augmented sample, for which the expert's logits are known; the code has the p of the
    sample without augmentation.

    The student and each expert have the same number of epochs and start from new weights. The experts' training is beyond
    the common number of image passes. During the student's training each sample also passes through every expert, without
    gradients; these passes are not counted. A group with fewer than two classes has no expert: it could teach nothing.

    Accuracies are those on the validation split. If the data has none, or if it lacks a group, they are those on the
    training samples without augmentation. The student soon knows its training samples, so that the distillation then
    fades within a few epochs.
    """

    def __init__(self, config: Config, counts: Tensor) -> None:
        super().__init__(config, counts)
        groups = split_classes(counts, config.run.split_rule)
        self.groups = {name: group for name, group in groups.items() if group.sum() > 1}
        epochs = config.optim.stage1_epochs + config.optim.stage2_epochs
        self.stages = [
            Stage(f"expert {name}", epochs, "random", group) for name, group in self.groups.items()
        ]
        self.stages.append(Stage("student", epochs, "balanced"))
        self.loss_coefficients = {"loss_balanced": 1.0, "loss_random": 1.0}
        self._is_last_epoch = False  # set by begin_epoch

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        """Return the student's head. `begin_stage` replaces it while an expert is trained."""
        return nn.Linear(in_features, num_classes)

    def losses(self, head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        """Return the loss of an expert, or that of a student without experts."""
        if isinstance(head, ExpertHead):
            return {"loss_random": head.loss(features, labels)}
        return {"loss_balanced": F.cross_entropy(wide(head(features)), labels)}

    def training_losses(
        self, model: Model, samples: Tensor, features: Tensor, labels: Tensor, num_balanced: int
    ) -> dict[str, Tensor]:
        experts = model.auxiliary
        if isinstance(model.head, ExpertHead) or not isinstance(experts, Experts):
            return self.losses(model.head, features, labels, num_balanced)
        teachers = experts.logits(model.normalize(samples))
        return {"loss_balanced": experts.loss(model.head(features), teachers, labels)}

    def restructure(self, model: Model) -> None:
        """Give the student all experts. `begin_stage` appends them one by one, as they are trained."""
        if not self.groups:
            return
        head = model.head
        assert isinstance(head, nn.Linear)
        experts = Experts(self._floors(), len(self.groups))
        for group in self.groups.values():
            expert_head = ExpertHead(head.in_features, group.cpu())
            experts.experts.append(Expert(model.backbone, model.center, expert_head))
        model.auxiliary = experts.to(head.weight)

    def begin_stage(self, stage: int, model: Model, data: StageData) -> None:
        if not self.groups:
            return
        head = model.head
        assert isinstance(head, nn.Linear)
        if stage == 0:
            model.auxiliary = Experts(self._floors(), len(self.groups)).to(head.weight)
        else:
            assert isinstance(head, ExpertHead)
            assert isinstance(model.auxiliary, Experts)
            model.auxiliary.experts.append(Expert(model.backbone, model.center, head))
        group = self.stages[stage].classes
        with torch.random.fork_rng(devices=[]):  # the weights depend on the seed and the stage alone
            torch.default_generator.manual_seed(self.config.run.seed + 1_000_003 * stage)
            if stage:
                reset_network(model, self.config.model.weights)
            new_head = self.make_head(head.in_features, len(self.counts))
            if group is not None:
                new_head = ExpertHead(head.in_features, group.cpu())
            model.head = new_head.to(head.weight)

    def begin_epoch(self, stage: int, epoch: int, model: Model) -> None:
        epochs = self.stages[stage].epochs
        self._is_last_epoch = epoch + 1 == epochs
        if isinstance(model.auxiliary, Experts):
            model.auxiliary.progress.fill_((epoch + 1) / (CURRICULUM_SHARE * epochs))

    def end_epoch(self, model: Model, data: StageData) -> None:
        head, experts = model.head, model.auxiliary
        if isinstance(head, ExpertHead):
            if self._is_last_epoch:
                head.accuracy.copy_(self._accuracies(head, self._samples(data), [head.group])[0])
                head.set_confidences(*data.training(), self._chunk())
        elif isinstance(experts, Experts):
            groups = [expert.head.group for expert in experts]
            student = self._accuracies(head, self._samples(data), groups)
            best = torch.stack([expert.head.accuracy for expert in experts])
            experts.weights.copy_(distillation_weight(student, best))

    def reads_training_features(self) -> bool:
        return bool(self.groups)

    def _floors(self) -> Tensor:
        """Return the least weight of a sample at the start of the curriculum, for each class, [K]."""
        counts = self.counts.double()
        means = {name: counts[group].mean() for name, group in self.groups.items()}
        floors = torch.ones_like(counts)
        for name, group in self.groups.items():
            floors[group] = torch.stack(list(means.values())).min() / means[name]
        return floors

    def _samples(self, data: StageData) -> LabeledFeatures:
        """Return the samples on which accuracies are measured."""
        samples = data.validation()
        if samples is None or not all(group[samples[1]].any() for group in self.groups.values()):
            return data.training()
        return samples

    def _chunk(self) -> int:
        """Return the number of samples whose logits are held at once: at most 64 MiB."""
        return max(1, 2**24 // len(self.counts))

    @torch.no_grad()
    def _accuracies(self, head: nn.Module, samples: LabeledFeatures, groups: list[Tensor]) -> Tensor:
        """Return the mean accuracy over the classes of each group that have samples, [len(groups)]."""
        features, labels = samples
        chunks = zip(features.split(self._chunk()), labels.split(self._chunk()), strict=True)
        correct = torch.cat([head(f).argmax(1) == y for f, y in chunks])
        total, right = (torch.bincount(y, minlength=len(self.counts)) for y in (labels, labels[correct]))
        accuracy = right / total.clamp(min=1)
        return torch.stack([accuracy[group & (total > 0)].mean() for group in groups])
