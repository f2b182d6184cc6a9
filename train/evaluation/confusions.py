"""The classes that few-shot classes are confused with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..shot_groups import split_classes

LISTED_CONFUSIONS = 3  # per class, at most
LISTED_CLASSES = 100  # if more classes are few-shot, those with the highest single confusion are listed
SHOWN_CONFUSIONS = 12  # with a test sample of each


def confusion(predicted: Tensor, data: Dataset, rule: str) -> list[dict[str, Any]]:
    """Return, for each few-shot class, the classes that its test samples are confused with, most frequent first.

    At most `LISTED_CLASSES` classes are listed, each with at most `LISTED_CONFUSIONS` others.
    """
    total = torch.bincount(data.y_test, minlength=data.num_classes)
    few = split_classes(data.train_counts, rule)["few"]
    confused: dict[int, list[tuple[int, int]]] = {int(k): [] for k in (few & (total > 0)).nonzero()}
    for own, other, count in _pairs(predicted, data, rule):
        confused[own].append((other, count))
    if len(confused) > LISTED_CLASSES:

        def highest_share(k: int) -> float:
            return confused[k][0][1] / int(total[k]) if confused[k] else 0.0

        confused = {
            k: confused[k] for k in sorted(confused, key=highest_share, reverse=True)[:LISTED_CLASSES]
        }
    return [
        {
            "class": data.class_names[k],
            "training": int(data.train_counts[k]),
            "accuracy": (int(total[k]) - sum(count for _, count in others)) / int(total[k]),
            "taken for": [
                [data.class_names[o], count / int(total[k])] for o, count in others[:LISTED_CONFUSIONS]
            ],
        }
        for k, others in confused.items()
    ]


def examples(confidence: Tensor, predicted: Tensor, data: Dataset, rule: str) -> list[dict[str, int]]:
    """Return the most frequent confusion of few-shot classes, at most `SHOWN_CONFUSIONS`, largest share first.

    Each class is listed once, with the count of this confusion, the number of its test samples, and the test sample of the
    most confident mistake.

    Args:
        confidence: the probability of the predicted class, [n].
        predicted: the predicted class of each test sample, [n].
        data: the dataset.
        rule: the rule of the groups of classes.
    """
    y = data.y_test
    total = torch.bincount(y, minlength=data.num_classes).tolist()
    worst: dict[int, tuple[int, int]] = {}
    for own, other, count in _pairs(predicted, data, rule):
        worst.setdefault(own, (other, count))
    shown = sorted(worst.items(), key=lambda item: -item[1][1] / total[item[0]])[:SHOWN_CONFUSIONS]
    listed = []
    for own, (other, count) in shown:
        confused = ((y == own) & (predicted == other)).nonzero().flatten()
        sample = int(confused[confidence[confused].argmax()])
        listed.append({"class": own, "taken for": other, "count": count, "of": total[own], "sample": sample})
    return listed


def _pairs(predicted: Tensor, data: Dataset, rule: str) -> list[tuple[int, int, int]]:
    """Return (few-shot class, class that it was taken for, number of test samples), most frequent first."""
    y, num_classes = data.y_test, data.num_classes
    few = split_classes(data.train_counts, rule)["few"]
    wrong = few[y] & (predicted != y)
    pairs, counts = torch.unique(y[wrong] * num_classes + predicted[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [
        (*divmod(pair, num_classes), count)
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]
