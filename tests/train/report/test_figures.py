"""Figures of the report: means by class size."""

from __future__ import annotations

import pytest

from train.report.figures import mean_accuracy_by_size


def test_accuracy_by_class_size_by_hand() -> None:
    few = {"train_counts": [5, 80, 20], "accuracy_per_class": [0.25, 1.0, None]}
    assert mean_accuracy_by_size(few) == [(80, 100), (5, 25)]
    counts = list(range(1, 26))  # ten tenths of two or three classes: 25 and 24, 23 to 21, …, 3 to 1
    many = {"train_counts": counts, "accuracy_per_class": [count / 25 for count in counts]}
    expected = [(size, 4 * size) for size in (24.5, 22, 19.5, 17, 14.5, 12, 9.5, 7, 4.5, 2)]
    assert [value for pair in mean_accuracy_by_size(many) for value in pair] == pytest.approx(
        [value for pair in expected for value in pair]
    )
