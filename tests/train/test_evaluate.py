"""Split rules against the published counts, accuracies against numbers made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train.data.longtail import long_tailed_counts
from train.evaluate import Evaluation, split_classes

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def test_groups_at_the_borders() -> None:
    counts = torch.tensor([101, 100, 99, 21, 20, 19, 1])
    sizes = {
        rule: [int(mask.sum()) for mask in split_classes(counts, rule).values()]
        for rule in ("standard", "paper_text", "paper_code")
    }
    assert sizes == {"standard": [1, 4, 2], "paper_text": [1, 3, 3], "paper_code": [2, 2, 3]}


def test_groups_of_imagenet_lt() -> None:
    file = SHARED / "imagenet_lt.json"
    if not file.exists():
        pytest.skip(f"no {file}: the published counts are not here")
    found = json.loads(file.read_text())
    counts = torch.tensor(next(v for v in found.values() if isinstance(v, list) and len(v) == 1000))
    expected = {"standard": [385, 479, 136], "paper_text": [385, 469, 146], "paper_code": [391, 463, 146]}
    for rule, sizes in expected.items():
        assert [int(mask.sum()) for mask in split_classes(counts, rule).values()] == sizes


def test_accuracies() -> None:
    correct, total = torch.tensor([9, 5, 1, 0]), torch.tensor([10, 10, 10, 0])
    found = Evaluation(correct, total, None)
    value = found.accuracy(torch.tensor([500, 50, 60, 5]), "standard")
    assert value == {
        "overall": pytest.approx(0.5),
        "many": pytest.approx(0.9),
        "medium": pytest.approx(0.3),
        "few": None,  # its one class has no test images
    }
    assert found.per_class() == [0.9, 0.5, 0.1, None]


def test_totals_of_the_published_long_tails() -> None:
    assert sum(long_tailed_counts(500, 100, 100)) == 10_847
    assert sum(long_tailed_counts(500, 100, 50)) == 12_608
    assert sum(long_tailed_counts(500, 100, 10)) == 19_573
    assert sum(long_tailed_counts(5000, 10, 100)) == 12_406
