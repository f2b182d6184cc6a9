"""Tests of the scores of each class."""

from __future__ import annotations

import pytest
import torch

from train.evaluation.per_class import class_scores, confusions


def test_scores_that_are_not_defined() -> None:
    """Class 0 is always found, 1 is never predicted, 2 has no samples, and 3 has neither samples nor predictions."""
    y, predicted = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 2, 0])
    scores = class_scores(y, predicted, confusions(y, predicted, 4), 4)
    assert scores.n == [2, 3, 0, 0]
    assert scores.precision == [pytest.approx(2 / 3), None, 0, None]
    assert scores.recall == [1, 0, None, None]
    assert scores.f1 == [pytest.approx(0.8), 0, 0, None]
    assert (scores.taken_for, scores.times) == ([None, 2, None, None], [0, 2, 0, 0])
    assert scores.mean("precision") == pytest.approx(1 / 3)
    found = confusions(y, predicted, 4)
    assert list(zip(found.true.tolist(), found.predicted.tolist(), found.count.tolist(), strict=True)) == [(0, 0, 2), (1, 0, 1), (1, 2, 2)]  # fmt: skip
