"""Tests of the classes of a model that other data name, and of samples without training samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.config import DataConfig
from train.data.errors import DataError
from train.data.labeled import ClassMatcher, Labeled, load_labeled, match

from ..conftest import COLORS, check_colors, write_image


def test_classes_are_found_by_name_and_by_label() -> None:
    matcher = ClassMatcher(["7", "8", "9"], ["ant", "bee", "cat"])
    assert matcher.find("0", "bee") == 1  # by name, whatever the label
    assert matcher.find("8", "emu") is None  # the label of a class with another name
    assert matcher.find("9", "9") == matcher.find("cat", "cat") == 2
    assert matcher.find("2", "2") is None  # a position is neither


def test_ambiguous_classes_are_refused() -> None:
    matcher = ClassMatcher(["0", "1", "2"], ["1", "0", "1"])
    assert [matcher.find(label, name) for label, name in (("0", "1"), ("1", "0"), ("2", "1"))] == [0, 1, 2]
    with pytest.raises(DataError, match="expected a class that one class of the model is called, got '1'"):
        matcher.find("1", "1")  # the label of one class and the name of others
    with pytest.raises(DataError, match="got '1'"):
        matcher.find("3", "1")  # the name of two classes
    assert matcher.find("2", "2") == 2


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
