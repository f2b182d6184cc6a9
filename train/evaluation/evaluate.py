"""Accuracy per class and per group of classes (many-, medium- and few-shot), and slot usage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, SlotUsage

from .. import distributed
from ..model.model import Model
from ..shot_groups import split_classes

#: (head, features, the head's logits) -> logits of other ways to use the head, by name.
AlternativeScores = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """The number of correct samples and of all samples of each class, [K], and the share that each slot wins, [M].

    A slot wins a sample if it is the best slot of the sample's own class.
    """

    correct: Tensor
    total: Tensor
    slot_usage: Tensor | None

    def per_class(self) -> list[float | None]:
        """Return the accuracy of each class; None for a class without samples."""
        pairs = zip(self.correct.tolist(), self.total.tolist(), strict=True)
        return [correct / total if total else None for correct, total in pairs]

    def accuracy(self, train_counts: Tensor, rule: str) -> dict[str, float | None]:
        """Return the overall accuracy and, for each group of classes, the mean of the classes' accuracies.

        The value is None for a group without classes.
        """
        result: dict[str, float | None] = {"overall": float(self.correct.sum()) / float(self.total.sum())}
        for group, mask in split_classes(train_counts, rule).items():
            tested = mask & (self.total > 0)
            result[group] = (
                float((self.correct[tested].double() / self.total[tested]).mean()) if tested.any() else None
            )
        return result


def eval_batch_size(num_classes: int) -> int:
    """Return 500, or fewer samples if the logits of 500 exceed 256 MiB."""
    return max(1, min(500, 2**26 // num_classes))


@torch.no_grad()
def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    alternative_scores: AlternativeScores | None = None,
    batch_size: int | None = None,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Classify all samples in evaluation mode. The model is left in training mode.

    Each process takes a part of the samples. All processes return the counts of all samples.

    Args:
        model: the network.
        x: images or features, [n, …], on any device.
        y: their labels, [n], on any device.
        num_classes: K.
        alternative_scores: other ways to use the head, which are evaluated too.
        batch_size: samples per batch; `eval_batch_size` if None.

    Returns:
        The evaluation of the head's own logits, and the evaluation of each alternative by its name.
    """
    model.eval()
    batch_size = batch_size or eval_batch_size(num_classes)
    device = next(model.parameters()).device
    x, y = (tensor.tensor_split(distributed.world_size())[distributed.rank()] for tensor in (x, y))
    y = y.to(device)
    usage = SlotUsage(model.head) if isinstance(model.head, ConstellationClassifier) else None
    predicted: dict[str, list[Tensor]] = {"": []}
    for samples, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        features = model.features(samples.to(device))
        if usage is None:
            logits = model.head(features)
        else:
            logits, slots = model.head(features, return_slots=True)
            usage.update_slots(slots, labels)
        predicted[""].append(logits.argmax(1))
        alternatives = alternative_scores(model.head, features, logits) if alternative_scores else {}
        for name, scores in alternatives.items():
            predicted.setdefault(name, []).append(scores.argmax(1))
    model.train()
    slot_usage = None
    if usage is not None:
        usage.counts = distributed.all_reduce_sum(usage.counts)
        slot_usage = usage.shares().cpu()

    def count_per_class(labels: Tensor) -> Tensor:
        return distributed.all_reduce_sum(torch.bincount(labels, minlength=num_classes)).cpu()

    total, evaluations = count_per_class(y), {}
    for name, batches in predicted.items():
        correct = count_per_class(y[torch.cat(batches) == y])
        evaluations[name] = Evaluation(correct, total, None if name else slot_usage)
    return evaluations.pop(""), evaluations
