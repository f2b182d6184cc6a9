"""The long-tailed subsets that the field calls CIFAR-LT, of any balanced set."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from .dataset import Dataset
from .errors import DataError


def long_tailed(data: Dataset, ratio: float) -> Dataset:
    """The same set with a long tail: the rule and the seed of CIFAR-LT.

    Raises:
        DataError: a class has fewer images than the rule gives it, or is given none.
    """
    largest = int(data.train_counts.max())
    counts = long_tailed_counts(largest, data.num_classes, ratio)
    if min(counts) == 0:
        raise DataError(
            f"--imbalance-ratio: expected at most {largest}, the largest class's samples, got {ratio:g}: "
            f"{counts.count(0)} classes would have none"
        )
    try:
        kept = torch.from_numpy(long_tailed_indices(data.y_train.numpy(), counts))
    except ValueError as error:
        raise DataError(f"--imbalance-ratio {ratio}: {error}") from None
    return dataclasses.replace(
        data, x_train=data.x_train[kept], y_train=data.y_train[kept], train_counts=torch.tensor(counts)
    )


def long_tailed_counts(largest: int, num_classes: int, imbalance_ratio: float) -> list[int]:
    """Images a class: exponential from `largest` for class 0 to `largest / imbalance_ratio` for the last one."""
    steps = max(num_classes - 1, 1)
    return [int(largest * (1.0 / imbalance_ratio) ** (k / steps)) for k in range(num_classes)]


def long_tailed_indices(labels: np.ndarray, counts: list[int], seed: int = 0) -> np.ndarray:
    """Which images the subset keeps: for each class in order, shuffle its images and take the first `counts[k]`.

    The published subsets were drawn with numpy's old global generator, so the same one draws here: another would
    choose other images.
    """
    rng = np.random.RandomState(seed)
    chosen = []
    for k, count in enumerate(counts):
        candidates = np.flatnonzero(labels == k)
        if count > len(candidates):
            raise ValueError(f"class {k}: {count} images wanted, {len(candidates)} there")
        rng.shuffle(candidates)
        chosen.append(candidates[:count])
    return np.concatenate(chosen)
