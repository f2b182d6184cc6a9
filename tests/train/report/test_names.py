"""Names of classes and runs: plain text in every figure, page, table and line, whatever their characters."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from train.__main__ import main
from train.report import figures, names
from train.report.figures import feature_map
from train.report.html import write_page
from train.report.markdown import plain
from train.report.names import GUARD, explanation, labels

from .test_html_report import SHORT, Page

MARKUP = ["US$^_$", "_hidden", "<b>bold</b> & \"'", "[red]x[/red] :cat:", "a\x1b[31mb\nc"]
HAN = "豹"


def mapped(classes: list[str]) -> dict[str, list[object]]:
    """Return a map of features with two samples, a center and a displaced center per class."""
    rows = [(name, 7.0 * number, 3.0 * number % 5) for number, name in enumerate(classes)]
    samples = [[name, x + i, y] for name, x, y in rows for i in range(2)]
    vectors = [[name, slot, x + slot, y] for name, x, y in rows for slot in range(2)]
    return {"classes": list(classes), "samples": samples, "vectors": vectors}


def drawn(classes: list[str]) -> np.ndarray:
    """Draw a map without a warning, as of a glyph that is missing; return its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = feature_map(mapped(classes))
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


@pytest.fixture
def few_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fonts that matplotlib includes, on a system without other fonts."""
    included = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", included)
    monkeypatch.setattr(names, "findSystemFonts", lambda: [])
    caches = (names._family, names._glyphs, names._add_new_fonts)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def make_font(file: Path, characters: str) -> None:
    """Write a font whose glyphs are squares."""
    pen = TTGlyphPen(None)
    for place, point in enumerate([(50, 0), (50, 700), (950, 700), (950, 0)]):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    order = [".notdef", *(f"u{ord(character):04X}" for character in characters)]
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(c): f"u{ord(c):04X}" for c in characters})
    builder.setupGlyf(dict.fromkeys(order, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made Up Han", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(file)


def test_no_name_is_a_formula_or_hidden() -> None:
    shown = labels(MARKUP)
    assert [label.removeprefix(GUARD) for label in shown] == [*MARKUP[:4], "a\\x1b[31mb\\nc"]
    assert explanation(MARKUP) == ""
    plain = drawn(["US", "hidden", "bold", "x", "abc"])
    assert (drawn(MARKUP) != plain).any()
    assert (drawn(["_a", "_b"]) != drawn(["_a", "__"])).any()  # a label with an underscore is shown
    assert (drawn(["$a$", "b"]) != drawn(["a", "b"])).any()
    assert (drawn(["\\$a", "b"]) != drawn(["$a", "b"])).any()


def test_names_are_no_formulas_with_latex() -> None:
    """A user's settings of matplotlib may pass all text to LaTeX."""
    with figures.rc_context({"text.usetex": True}):
        assert drawn(["US$^_$", "50%"]).size


@pytest.mark.usefixtures("few_fonts")
def test_a_name_without_a_font_has_a_number(caplog: pytest.LogCaptureFixture) -> None:
    classes = ["cat", HAN, "כלב", "हिन्दी", "dog"]
    assert [label.removeprefix(GUARD) for label in labels(classes)] == ["cat", "#2", "#3", "#4", "dog"]
    assert explanation(classes) == f"#2 is {HAN}, #3 is כלב, #4 is हिन्दी"
    drawn(classes)
    assert caplog.text == ""


@pytest.mark.usefixtures("few_fonts")
def test_a_font_that_has_the_characters_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The font may have been installed after matplotlib made its list of fonts."""
    box = drawn([HAN, "b"])
    for cache in (names._family, names._add_new_fonts):
        cache.cache_clear()
    make_font(tmp_path / "han.ttf", HAN)
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    system = [str(tmp_path / "damaged.ttf"), str(tmp_path / "han.ttf")]
    monkeypatch.setattr(names, "findSystemFonts", lambda: system)
    assert labels([HAN]) == [GUARD + HAN]
    assert names.families(f"a{HAN}") == ["Made Up Han"]
    assert (drawn([HAN, "b"]) != box).any()


def test_decomposed_accents_are_composed() -> None:
    """The file system of macOS decomposes accents in names of folders."""
    assert labels(["e\u0301tudes"]) == [GUARD + "études"]


def test_long_names_are_cut_in_the_middle_and_stay_distinct() -> None:
    long = ["a" * 100 + "end", "b" * 100 + "end", "a" * 50 + "x" + "a" * 49 + "end"]
    shown = [label.removeprefix(GUARD) for label in labels(long)]
    assert shown == ["#1", "b" * 29 + "…" + "b" * 27 + "end", "#3"]
    assert explanation(long) == f"#1 is {long[0]}, #3 is {long[2]}"


def test_names_in_markdown() -> None:
    assert plain("made_up.csv") == "made_up.csv"
    assert plain("_a_|*b*<c>\n$d$") == r"\_a\_\|\*b\*\<c>\\n\$d\$"


def test_a_figure_that_fails_is_a_sentence(tmp_path: Path) -> None:
    accuracy = dict.fromkeys(("overall", "many", "medium", "few"), 0.5)
    epoch = {"event": "epoch", "method": "plain", "images": 7, "split": "test", "accuracy": accuracy}
    result = {"event": "result", "method": "plain", "images": 7, "accuracy": accuracy}
    result |= {"accuracy_per_class": [0.5], "train_counts": [3]}
    write_page(tmp_path / "page.html", {"r": [epoch | {"loss": {}}, result]}, "r", "")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Training loss, mean of each epoch. Not drawn: " in page.words
    assert len(page.images) == 2


def test_a_run_with_such_names(
    feature_arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "features.npz", **feature_arrays, classes=np.array(MARKUP))
    run = tmp_path / "US$^_$ [b]<i>"
    args = f"--recipe features --methods plain {SHORT} --resume --runs".split()
    args += [str(tmp_path), "--name", run.name, "--data", str(tmp_path / "features.npz")]
    for _ in range(2):  # the second time the run is finished, and the report is written again
        assert main(args) == 0
        assert f"written to {run}\n" in capsys.readouterr().out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert run.name in page.words
    assert "Not drawn" not in page.words
    assert "\x1b" not in page.words
    few = [
        row["class"]
        for row in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["analysis"]["confusion"]
    ]
    for name in few:
        assert name.replace("\x1b", "\\x1b").replace("\n", "\\n") in page.words
    assert (run / "accuracy.png").is_file()
