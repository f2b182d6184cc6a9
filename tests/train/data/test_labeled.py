"""Tests of the classes of a model that other data name, and of samples without training samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train.config import DataConfig
from train.data.errors import DataError
from train.data.labeled import ClassMatcher, Labeled, load_labeled, match

from ..conftest import COLORS, check_colors, write_image


def test_classes_are_found_by_name_and_by_label() -> None:
    matcher = ClassMatcher(["7", "8", "9"], ["ant", "bee", "cat"])
    assert matcher.find("0", "bee") == 1  # by name, whatever the label
    assert matcher.find("8", "emu") is None  # the label of a class with another name
    assert matcher.find("9") == matcher.find("cat") == 2
    assert matcher.find("2") is None  # a position is neither


def test_ambiguous_classes_are_refused() -> None:
    matcher = ClassMatcher(["0", "1", "2"], ["1", "0", "1"])
    assert [matcher.find(label, name) for label, name in (("0", "1"), ("1", "0"), ("2", "1"))] == [0, 1, 2]
    fits = r"stands for one class of the model, got '1', which fits '1' \(label 0\), '0' \(label 1\), '1' \(label 2\)"
    with pytest.raises(DataError, match=fits):
        matcher.find("1")  # the label of one class and the name of others
    with pytest.raises(DataError, match=r"got '1', which fits '1' \(label 0\), '1' \(label 2\)$"):
        matcher.find("3", "1")  # the name of two classes
    assert matcher.find("2") == 2


def labeled(labels: list[str], names: list[str]) -> Labeled:
    """Return two samples of each class."""
    y = torch.arange(len(labels)).repeat(2)
    return Labeled(torch.zeros(len(y), 3), y, labels, names, "all samples")


def test_names_in_another_order_stand_for_their_classes() -> None:
    """The name 2 is also the label of its class, and the label of another class of the model."""
    matcher = ClassMatcher(["0", "1", "2"], ["2", "10", "1"])
    found = match(labeled(["0", "1", "2"], ["1", "10", "2"]), matcher, skip_unknown=False)
    assert found.y.tolist() == [2, 1, 0] * 2


@pytest.mark.parametrize("names", [["crane", "crane"], ["10", "11"]])
def test_two_classes_that_are_called_the_same_are_refused(names: list[str]) -> None:
    matcher = ClassMatcher(["10", "11"], ["crane", "11"])
    data = labeled(names if names[0] == "10" else ["3", "4"], ["crane", "crane"])
    with pytest.raises(
        DataError, match=r"one class that is called 'crane', got two, with the labels (3 and 4|10 and 11)"
    ):
        match(data, matcher, skip_unknown=False)


def test_unicode_has_one_normalization_form() -> None:
    """Folders copied from a Mac have accents of their own."""
    matcher = ClassMatcher(["0", "1"], ["\u00e9l\u00e9phant", "o\u0301"])
    assert matcher.find("e\u0301le\u0301phant") == 0
    assert matcher.find("7", "\u00f3") == 1


def test_lists_and_folders_without_training_samples(tmp_path: Path, cache: str) -> None:
    """The categories stand in another order than the model's classes, and one has no images."""
    for name, color in COLORS.items():
        write_image(tmp_path / "photos" / name / "0.png", color)
    names = ["cat", "emu", "ant", "bee"]
    content = {
        "images": [{"id": i, "file_name": f"{name}/0.png"} for i, name in enumerate(COLORS)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": names.index(n)} for i, n in enumerate(COLORS)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (tmp_path / "photos" / "list.json").write_text(json.dumps(content), encoding="utf-8")
    matcher = ClassMatcher(["10", "11", "12"], list(COLORS))
    for source in (tmp_path / "photos", tmp_path / "photos" / "list.json"):
        data = load_labeled(DataConfig(data=str(source), image_size=8, cache=cache), workers=1)
        assert data.part == "all samples"
        found = match(data, matcher, skip_unknown=False)
        assert (sorted(found.y.tolist()), found.skipped) == ([0, 1, 2], {})
        check_colors(found.x, found.y)


def test_skipped_samples_are_counted_by_class(tmp_path: Path, cache: str) -> None:
    for name, color in COLORS.items():
        write_image(tmp_path / "photos" / name / "0.png", color)
    data = load_labeled(DataConfig(data=str(tmp_path / "photos"), image_size=8, cache=cache), workers=1)
    assert isinstance(data, Labeled)
    found = match(data, ClassMatcher(["ant", "cat"], ["ant", "cat"]), skip_unknown=True)
    assert (found.y.tolist(), found.skipped, len(found.x)) == ([0, 1], {"bee": 1}, 2)
