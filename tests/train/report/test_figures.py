"""Figures of the report: means by class size, and Chinese class names."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.font_manager import findSystemFonts, fontManager

from train.report.figures import (
    CJK_FONTS,
    installed_cjk_fonts,
    mean_accuracy_by_size,
    render,
)


def test_accuracy_by_class_size_by_hand() -> None:
    few = {"train_counts": [5, 80, 20], "accuracy_per_class": [0.25, 1.0, None]}
    assert mean_accuracy_by_size(few) == [(80, 100), (5, 25)]
    counts = list(range(1, 26))  # ten tenths of two or three classes: 25 and 24, 23 to 21, …, 3 to 1
    many = {"train_counts": counts, "accuracy_per_class": [count / 25 for count in counts]}
    expected = [(size, 4 * size) for size in (24.5, 22, 19.5, 17, 14.5, 12, 9.5, 7, 4.5, 2)]
    assert [value for pair in mean_accuracy_by_size(many) for value in pair] == pytest.approx(
        [value for pair in expected for value in pair]
    )


def test_chinese_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fonts may have been installed after matplotlib made its list of fonts."""
    there = [file for file in findSystemFonts() if Path(file).name in CJK_FONTS.values()]
    if not there:
        pytest.skip(f"none of {', '.join(CJK_FONTS.values())} is installed")
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if f.fname not in there])
    installed_cjk_fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about missing glyphs
        render(lambda axes: axes.plot([0, 1], label="一 is a class"))
    installed_cjk_fonts.cache_clear()
