"""Accuracy by class, and by groups of classes: many-, medium- and few-shot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, SlotUsage

from .. import distributed
from ..model.model import Model
from ..shot_groups import split_classes


@dataclass(frozen=True)
class Evaluation:
    """Test images and correct ones of each class, [K]; the share of images that each slot of their class won, [M]."""

    correct: Tensor
    total: Tensor
    slot_usage: Tensor | None

    def per_class(self) -> list[float | None]:
        """Accuracy of each class; None for a class without test images."""
        pairs = zip(self.correct.tolist(), self.total.tolist(), strict=True)
        return [correct / total if total else None for correct, total in pairs]

    def accuracy(self, train_counts: Tensor, rule: str) -> dict[str, float | None]:
        """The share of images classified correctly, and for each group the mean of its classes' accuracies.

        None for a group without classes.
        """
        result: dict[str, float | None] = {"overall": float(self.correct.sum()) / float(self.total.sum())}
        for group, mask in split_classes(train_counts, rule).items():
            tested = mask & (self.total > 0)
            result[group] = (
                float((self.correct[tested].double() / self.total[tested]).mean()) if tested.any() else None
            )
        return result


def samples_at_once(num_classes: int) -> int:
    """500, or as many as have logits of 256 MiB if those are fewer."""
    return max(1, min(500, 2**26 // num_classes))


@torch.no_grad()
def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    readings: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]] | None = None,
    batch_size: int | None = None,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Classify all of `x` in evaluation mode; the model is left in training mode.

    Each process takes a part of the samples; all get the counts of the whole.

    Args:
        model: the network.
        x: images or features, [n, …].
        y: their classes, [n]; as x, anywhere.
        num_classes: K.
        readings: (head, features, the head's logits) -> logits of other ways to use the head, by name.
        batch_size: samples at a time; `samples_at_once` if None.

    Returns:
        The evaluation of the head's own logits, and one for each of `readings`.
    """
    model.eval()
    batch_size = batch_size or samples_at_once(num_classes)
    device = next(model.parameters()).device
    x, y = (tensor.tensor_split(distributed.world_size())[distributed.rank()] for tensor in (x, y))
    y = y.to(device)
    usage = SlotUsage(model.head) if isinstance(model.head, ConstellationClassifier) else None
    predicted: dict[str, list[Tensor]] = {"": []}
    for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        features = model.features(part.to(device))
        if usage is None:
            logits = model.head(features)
        else:
            logits, slots = model.head(features, return_slots=True)
            usage.update_slots(slots, labels)
        predicted[""].append(logits.argmax(1))
        for name, scores in (readings(model.head, features, logits) if readings else {}).items():
            predicted.setdefault(name, []).append(scores.argmax(1))
    model.train()
    shares = None
    if usage is not None:
        usage.counts = distributed.all_reduce_sum(usage.counts)
        shares = usage.shares().cpu()

    def counted(labels: Tensor) -> Tensor:
        return distributed.all_reduce_sum(torch.bincount(labels, minlength=num_classes)).cpu()

    total, made = counted(y), {}
    for name, parts in predicted.items():
        correct = counted(y[torch.cat(parts) == y])
        made[name] = Evaluation(correct, total, None if name else shares)
    return made.pop(""), made
