"""Precision, recall, F1 and confusions of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Confusions:
    """The pairs of a true and a predicted class that occur, in this order of the classes, with their counts, [P] each."""

    true: Tensor
    predicted: Tensor
    count: Tensor


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, [K]; None where a score is not defined.

    `taken_for` is the class that the samples of a class are wrongly predicted as most often (of several, the first), and
    `times` how often; None and 0 if all samples are classified correctly.
    """

    n: list[int]
    precision: list[float | None]
    recall: list[float | None]
    f1: list[float | None]
    taken_for: list[int | None]
    times: list[int]

    def mean(self, name: str) -> float:
        """Return the mean of a score over the classes that have samples. A score that is not defined counts as 0."""
        values = [value or 0.0 for value, n in zip(getattr(self, name), self.n, strict=True) if n]
        return sum(values) / len(values)


def confusions(y: Tensor, predicted: Tensor, num_classes: int) -> Confusions:
    """Count the pairs of classes. Memory depends on the number of samples, not on that of pairs of classes.

    Args:
        y: the classes of the samples, [n].
        predicted: the predicted classes, [n].
        num_classes: K.
    """
    pairs, count = torch.unique(y * num_classes + predicted, return_counts=True)
    return Confusions(pairs // num_classes, pairs % num_classes, count)


def class_scores(y: Tensor, predicted: Tensor, found: Confusions, num_classes: int) -> ClassScores:
    """Return the scores of each class; the arguments are those of `confusions`, and what it returns.

    A precision is not defined for a class that is never predicted, a recall for a class without samples, and F1 for a class
    with neither.
    """
    # Imported here because it takes a second, also for --help.
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, n = precision_recall_fscore_support(
        y.numpy(), predicted.numpy(), labels=np.arange(num_classes), zero_division=np.nan
    )
    wrong = found.true != found.predicted
    true, other, count = found.true[wrong], found.predicted[wrong], found.count[wrong]
    order = count.argsort(descending=True, stable=True)
    taken_for: list[int | None] = [None] * num_classes
    times = [0] * num_classes
    for k, to, number in zip(true[order].tolist(), other[order].tolist(), count[order].tolist(), strict=True):
        if taken_for[k] is None:
            taken_for[k], times[k] = to, number
    return ClassScores(n.tolist(), _defined(precision), _defined(recall), _defined(f1), taken_for, times)


def _defined(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]
