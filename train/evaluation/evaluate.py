"""Accuracy per class and per group of classes (many-, medium- and few-shot), and slot usage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, SlotUsage

from .. import distributed
from ..model.model import Model
from ..model.sharded_head import is_sharded
from ..shot_groups import split_classes

#: (head, features, the head's logits) -> logits of other ways to use the head, by name.
AlternativeScores = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
#: (sharded head, features) -> classes that other ways to use the head predict, by name.
AlternativePredictions = Callable[[nn.Module, Tensor], dict[str, Tensor]]


MAX_BATCH = 500  # samples


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


def record_of(
    own: Evaluation, alternatives: dict[str, Evaluation], train_counts: Tensor, rule: str
) -> dict[str, Any]:
    """Return the accuracies of an evaluation and of other ways to use the head, and the slot usage, in plain types."""
    record: dict[str, Any] = {"accuracy": own.accuracy(train_counts, rule)}
    if alternatives:
        record["accuracy_of"] = {name: e.accuracy(train_counts, rule) for name, e in alternatives.items()}
    if own.slot_usage is not None:
        record["slot_usage"] = own.slot_usage.tolist()
    return record


def details_of(own: Evaluation, train_counts: Tensor) -> dict[str, Any]:
    """Return the accuracy and the numbers of samples of each class, in plain types."""
    return {
        "accuracy_per_class": own.per_class(),
        "train_counts": train_counts.tolist(),
        "test_counts": own.total.tolist(),
    }


def eval_batch_size(num_classes: int) -> int:
    """Return 500, or fewer samples if the logits of 500 exceed 256 MiB."""
    return max(1, min(MAX_BATCH, 2**26 // num_classes))


@torch.no_grad()
def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    alternative_scores: AlternativeScores | None = None,
    batch_size: int | None = None,
    *,
    alternative_predictions: AlternativePredictions | None = None,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Classify all samples in evaluation mode. The model is left in training mode.

    Each process takes a part of the samples. All processes return the counts of all samples.

    Args:
        model: the network.
        x: images or features, [n, …], on any device.
        y: their labels, [n], on any device.
        num_classes: K.
        alternative_scores: other ways to use the head, which are evaluated too.
        batch_size: samples per batch; if None, `eval_batch_size`, or `MAX_BATCH` of a sharded head, which has no logits.
        alternative_predictions: other ways to use a sharded head, in place of `alternative_scores`.

    Returns:
        The evaluation of the head's own logits, and the evaluation of each alternative by its name.
    """
    model.eval()
    head, sharded = model.head, is_sharded(model.head)
    usage = SlotUsage(head) if isinstance(head, ConstellationClassifier) else None
    own_labels: list[Tensor] = []
    predicted: dict[str, list[Tensor]] = {}
    if batch_size is None and not sharded:
        batch_size = eval_batch_size(num_classes)
    for features, labels in own_features(model, x, y, batch_size or MAX_BATCH):
        if sharded:
            classes = {"": head.predict(features)}  # type: ignore[operator]
            if usage is not None:
                usage.update(features, labels)
            classes |= alternative_predictions(head, features) if alternative_predictions else {}
        else:
            if usage is None:
                logits = head(features)
            else:
                logits, slots = head(features, return_slots=True)
                usage.update_slots(slots, labels)
            scores = alternative_scores(head, features, logits) if alternative_scores else {}
            classes = {name: values.argmax(1) for name, values in ({"": logits} | scores).items()}
        for name, batch in classes.items():
            predicted.setdefault(name, []).append(batch)
        own_labels.append(labels)
    model.train()
    slot_usage = None
    if usage is not None:
        if not sharded:  # a sharded head counts the samples of all processes
            usage.counts = distributed.all_reduce_sum(usage.counts)
        slot_usage = usage.shares().cpu()
    y = torch.cat(own_labels)

    def count_per_class(labels: Tensor) -> Tensor:
        return distributed.all_reduce_sum(torch.bincount(labels, minlength=num_classes)).cpu()

    total, evaluations = count_per_class(y), {}
    for name, batches in predicted.items():
        correct = count_per_class(y[torch.cat(batches) == y])
        evaluations[name] = Evaluation(correct, total, None if name else slot_usage)
    return evaluations.pop(""), evaluations


def own_features(
    model: Model, x: Tensor, y: Tensor, batch_size: int = MAX_BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features and the labels of this process's part of the samples, in batches, on the model's device.

    A sharded head needs all processes for each batch, so that there are as many in each process, and the last may be empty.
    """
    parameter, size = next(model.parameters()), distributed.world_size()
    own_x, own_y = (tensor.tensor_split(size)[distributed.rank()] for tensor in (x, y))
    batches = list(zip(own_x.split(batch_size), own_y.split(batch_size), strict=True))
    for samples, labels in batches:
        yield model.features(samples.to(parameter.device)), labels.to(parameter.device)
    largest = -(-len(x) // size)  # number of samples of a process
    head: Any = model.head
    if is_sharded(head) and len(batches) < -(-largest // batch_size):
        empty = torch.zeros(0, head.in_features, dtype=parameter.dtype, device=parameter.device)
        yield empty, own_y[:0].to(parameter.device)
