"""Long-tailed subsets of balanced datasets, by the rule of CIFAR-LT."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ..console import counted
from .dataset import Dataset
from .errors import DataError


def long_tailed(data: Dataset, ratio: float) -> Dataset:
    """Return the dataset with a long-tailed subset of its training split, by the rule and the seed of CIFAR-LT.

    Raises:
        DataError: a class has fewer samples than the rule requires, or the rule leaves it none.
    """
    largest = int(data.train_counts.max())
    counts = long_tailed_counts(largest, data.num_classes, ratio)
    if min(counts) == 0:
        raise DataError(
            f"--imbalance-ratio: expected at most {largest}, the size of the largest class, got {ratio:g}, "
            f"which leaves {counted(counts.count(0), 'class', 'classes')} without samples"
        )
    try:
        kept = torch.from_numpy(long_tailed_indices(data.y_train.numpy(), counts))
    except ValueError as error:
        raise DataError(f"--imbalance-ratio {ratio:g}: {error}") from None
    return dataclasses.replace(
        data, x_train=data.x_train[kept], y_train=data.y_train[kept], train_counts=torch.tensor(counts)
    )


def long_tailed_counts(largest: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    """Return the class sizes: exponential, from `largest` for class 0 to `largest / imbalance_ratio` for the last."""
    steps = max(num_classes - 1, 1)
    return [int(largest * (1.0 / imbalance_ratio) ** (k / steps)) for k in range(num_classes)]


def long_tailed_indices(labels: np.ndarray, counts: list[int]) -> np.ndarray:
    """Return the indices of the subset: class by class, the first `counts[k]` of the class's shuffled samples.

    The published subsets were drawn with NumPy's legacy generator. Another generator would choose other images.

    Raises:
        ValueError: a class has fewer samples than its count.
    """
    rng = np.random.RandomState(0)
    chosen = []
    for k, count in enumerate(counts):
        candidates = np.flatnonzero(labels == k)
        if count > len(candidates):
            raise ValueError(f"class {k}: expected at least {count} samples, got {len(candidates)}")
        rng.shuffle(candidates)
        chosen.append(candidates[:count])
    return np.concatenate(chosen)
