"""Character frequencies, font faces and rendering, with the fonts that matplotlib includes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from train.data.errors import DataError
from train.data.glyphs.characters import character_frequencies
from train.data.glyphs.drawing import MARGIN, Variation, fit_to_square, render_ink
from train.data.glyphs.faces import FAMILIES, check_coverage, family_of, find_faces
from train.data.glyphs.plan import VARIATION_HIGH, VARIATION_LOW

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SIZE = 16


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Noto Sans CJK JP", "Noto Sans CJK"),
        ("Noto Sans Mono CJK SC", "Noto Sans CJK"),
        ("Noto Serif CJK HK", "Noto Serif CJK"),
        ("LXGW WenKai Mono Light", "LXGW WenKai"),
        ("WenQuanYi Zen Hei Sharp", "WenQuanYi Zen Hei"),
        ("WenQuanYi Micro Hei Mono", "WenQuanYi Micro Hei"),
        ("HanaMinB", "HanaMin"),
        ("Unifont-JP", "Unifont"),
        ("TW-Kai", "TW-Kai"),
        ("TW-Sung-Ext-B", "TW-Sung-Ext-B"),
        ("BabelStone Han", "BabelStone Han"),
    ],
)
def test_family_names_leave_out_weight_region_and_width(name: str, family: str) -> None:
    assert family_of(name) == family


def test_no_family_is_in_two_splits() -> None:
    families = [family for part in FAMILIES.values() for family in part]
    assert len(set(families)) == len(families)


def test_frequencies_count_characters_in_words(tmp_path: Path) -> None:
    words = tmp_path / "dict.txt"
    words.write_text("中国 10 ns\n国国 4 n\n人 14 n\nA股 7 n\n丁 10 n\n〇 99 m\n", encoding="utf-8")
    # 国 10 + 2·4; 人 14; 丁 and 中 10, by code point; 股 7. No letters, no 〇.
    found = character_frequencies(words, 5)
    assert list(found.items()) == [("国", 18), ("人", 14), ("丁", 10), ("中", 10), ("股", 7)]
    assert list(character_frequencies(words, 2)) == ["国", "人"]
    with pytest.raises(DataError, match="expected 6 different Chinese characters, got 5"):
        character_frequencies(words, 6)
    words.write_text("中国 many ns\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"expected lines of a word and its frequency, got .*many"):
        character_frequencies(words, 1)


def test_boxes_and_blanks_are_dropped() -> None:
    [face] = find_faces([FONTS / "DejaVuSans.ttf"], ["DejaVu Sans"])
    found = check_coverage(face, "aβ中国\u2003Ж", 2 * SIZE)
    assert found.present == [True, True, False, False, False, True]
    assert (found.num_boxes, found.num_blank) == (2, 1)


def test_placeholders_that_a_font_lists_as_characters_are_dropped(tmp_path: Path) -> None:
    """The font has an image of its own for many characters, which differs from that of unlisted characters."""
    ideographs = [chr(0x4E00 + i) for i in range(20)]
    pictures = {".notdef": (0, 0, 900, 900), "tofu": (0, 0, 500, 900), "bar": (0, 0, 100, 900)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(pictures))
    builder.setupCharacterMap({ord(c): "tofu" for c in ideographs} | {ord("l"): "bar", ord("I"): "bar"})
    drawn = {}
    for name, (left, bottom, right, top) in pictures.items():
        pen = TTGlyphPen(None)
        pen.moveTo((left, bottom))
        for corner in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(corner)
        pen.closePath()
        drawn[name] = pen.glyph()
    builder.setupGlyf(drawn)
    builder.setupHorizontalMetrics(dict.fromkeys(pictures, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Tofu", "styleName": "Regular"})
    builder.setupPost()
    builder.save(tmp_path / "tofu.ttf")
    [face] = find_faces([tmp_path / "tofu.ttf"], ["Tofu"])
    found = check_coverage(face, [*ideographs, "l", "I", "x"], 2 * SIZE)
    assert found.present == [False] * 20 + [True, True, False]


def test_ink_is_in_the_middle_as_large_as_fits() -> None:
    image = Image.new("L", (30, 10), 255)  # three times as wide as high
    drawn = fit_to_square(image, 20, Variation())
    rows, columns = np.flatnonzero(drawn.max(1) > 128), np.flatnonzero(drawn.max(0) > 128)
    assert (columns[0], columns[-1]) == (MARGIN, 19 - MARGIN)
    assert (rows[0], rows[-1]) == (7, 12)
    [face] = find_faces([FONTS / "DejaVuSans.ttf"], ["DejaVu Sans"])
    for character in "A,'jW—":
        ink = render_ink(face.open(40), character)
        assert ink is not None
        drawn = fit_to_square(ink, 20, Variation()).astype(float)
        for axis in (0, 1):
            there = np.flatnonzero(drawn.max(axis) > 20)
            assert abs(there[0] + there[-1] - 19) <= 1, character  # as far from both sides


def test_no_variation_cuts_the_ink(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        size = tuple(rng.integers(3, 60, 2).tolist())
        drawn = fit_to_square(
            Image.new("L", size, 255), 20, Variation(*rng.uniform(VARIATION_LOW, VARIATION_HIGH).tolist())
        )
        edges = [drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]]
        assert max(edge.max() for edge in edges) < 64, size
        assert drawn.max() > 100, size  # a thin bar may be less than a pixel wide


def test_weight_makes_strokes_bolder() -> None:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).line((5, 20, 35, 20), 255, 3)
    light, plain, bold = (fit_to_square(image, 20, Variation(weight=w)).sum() for w in (-1.0, 0.0, 1.0))
    assert light < plain < bold
