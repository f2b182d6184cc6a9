"""CIFAR-LT's rule: published totals, counts without repeats, and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load
from train.data.longtail import long_tailed_counts, long_tailed_indices
from train.data.sources.arrays import load_arrays

from ..conftest import COUNTS, shared_file


@pytest.mark.parametrize(
    ("largest", "num_classes", "ratio", "total"),
    [(500, 100, 100, 10847), (500, 100, 50, 12608), (500, 100, 10, 19573), (5000, 10, 100, 12406)],
)
def test_published_totals_of_cifar_lt(largest: int, num_classes: int, ratio: int, total: int) -> None:
    counts = long_tailed_counts(largest, num_classes, ratio)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (largest, largest // ratio)


def test_counts_of_cifar100_lt_data() -> None:
    data = load_arrays(str(shared_file("cifar100_lt100.npz")), num_classes=100)
    assert data.train_counts.tolist() == long_tailed_counts(500, 100, 100)
    assert data.sample_shape == [3, 32, 32]
    assert torch.bincount(data.y_test).tolist() == [100] * 100


def test_long_tailed_subset_has_its_counts_and_no_repeats(seed: int) -> None:
    y = np.random.default_rng(seed).integers(0, 7, 5000)
    counts = long_tailed_counts(300, 7, 30)
    chosen = long_tailed_indices(y, counts)
    assert np.bincount(y[chosen]).tolist() == counts
    assert len(set(chosen.tolist())) == len(chosen)
    assert (chosen == long_tailed_indices(y, counts)).all()
    with pytest.raises(ValueError, match="class 0: expected at least 5000 samples, got"):
        long_tailed_indices(y, [5000] * 7)


def test_an_imbalance_ratio_that_empties_classes(image_file: Path) -> None:
    assert load(DataConfig(data=str(image_file), imbalance_ratio=60)).train_counts.tolist()[0] == COUNTS[0]
    expected = r"--imbalance-ratio: expected at most 120, the size of the largest class, got 200, which leaves 1 class without"
    with pytest.raises(DataError, match=expected):
        load(DataConfig(data=str(image_file), imbalance_ratio=200))
