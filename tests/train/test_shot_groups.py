"""Split rules: their limits, and the published numbers of classes per group."""

from __future__ import annotations

import json

import pytest
import torch

from train.shot_groups import GROUPS, split_classes

from .conftest import shared_file


@pytest.mark.parametrize(
    ("rule", "many", "few"),
    [
        ("standard", [101, 500], [5, 19]),
        ("paper_text", [101, 500], [5, 19, 20]),
        ("paper_code", [100, 101, 500], [5, 19, 20]),
    ],
)
def test_split_rules_at_their_borders(rule: str, many: list[int], few: list[int]) -> None:
    counts = torch.tensor([500, 101, 100, 99, 21, 20, 19, 5])
    split = {group: sorted(counts[mask].tolist()) for group, mask in split_classes(counts, rule).items()}
    assert split["many"] == many
    assert split["few"] == few
    assert sorted(split["many"] + split["medium"] + split["few"]) == sorted(counts.tolist())


@pytest.mark.parametrize(
    ("file", "sizes"),
    [
        (
            "imagenet_lt.json",
            {"paper_code": (391, 463, 146), "standard": (385, 479, 136), "paper_text": (385, 469, 146)},
        ),
        (
            "places_lt.json",
            {"paper_code": (132, 156, 77), "standard": (131, 163, 71), "paper_text": (131, 157, 77)},
        ),
    ],
)
def test_split_rules_on_published_counts(file: str, sizes: dict[str, tuple[int, ...]]) -> None:
    content = json.loads(shared_file(file).read_text())
    counts = torch.tensor(content["counts"])
    for rule, expected in sizes.items():
        split = split_classes(counts, rule)
        assert tuple(int(split[group].sum()) for group in GROUPS) == expected
