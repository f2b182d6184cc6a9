"""Names in figures: no name is markup, and a name that no installed font can draw has a number that the text explains."""

from __future__ import annotations

import contextlib
import functools
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence

from matplotlib.font_manager import (
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)

from ..console import printable

#: The first character of a label that holds a name: matplotlib leaves out labels that begin with an underscore.
GUARD = "\u2060"
LONGEST = 60  # characters of a name in a legend
#: Beginnings of families that have boxes, blanks or symbols in place of other characters.
UNSUITABLE = ("Last Resort", "Adobe Blank", "cm", "STIXSize", "STIXNonUnicode")
#: Classes of characters that matplotlib draws in the wrong order or form: right to left, and Indic vowels.
UNORDERED = ("R", "AL", "AN", "Mc")


def labels(names: Sequence[str]) -> list[str]:
    """Return the label of each name in a legend: the name or, if it cannot be drawn, its number."""
    return [GUARD + (text or f"#{number}") for number, text in enumerate(_texts(names), start=1)]


def explanation(names: Sequence[str]) -> str:
    """Return the names whose numbers `labels` shows, such as "#2 is 美洲豹"; an empty text if there are none."""
    texts = _texts(names)
    return ", ".join(
        f"#{number} is {name}" for number, name in enumerate(names, start=1) if texts[number - 1] is None
    )


def families(text: str) -> list[str]:
    """Return the font families that draw the characters of a text and that matplotlib's default does not have."""
    found = dict.fromkeys(filter(None, map(_family, text)))
    return sorted(found.keys() - {""})


def _texts(names: Sequence[str]) -> list[str | None]:
    """Return the text of each name; None if it cannot be drawn, or looks like another one when it is cut."""
    texts = [_shortened(printable(unicodedata.normalize("NFC", name))) for name in names]
    count = Counter(texts)
    return [
        text if _is_drawable(text) and (count[text] == 1 or names.count(name) == count[text]) else None
        for name, text in zip(names, texts, strict=True)
    ]


def _shortened(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def _is_drawable(text: str) -> bool:
    classes = {unicodedata.bidirectional(c) for c in text} | {unicodedata.category(c) for c in text}
    return classes.isdisjoint(UNORDERED) and all(_family(c) is not None for c in text)


@functools.cache
def _family(character: str) -> str | None:
    """Return the family that draws a character: "" for matplotlib's default, None if none does."""
    if ord(character) in _glyphs(""):
        return ""
    for refresh in (False, True):
        if refresh:
            _add_new_fonts()
        installed = {font.name for font in fontManager.ttflist if not font.name.startswith(UNSUITABLE)}
        # Fonts without serifs first, as the other labels of the figure have none.
        for name in sorted(installed, key=lambda name: ("Sans" not in name, name)):
            if ord(character) in _glyphs(name):
                return name
    return None


@functools.cache
def _glyphs(family: str) -> frozenset[int]:
    """Return the characters of the font that matplotlib takes for a family, or by default."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about each family without a regular weight
    try:
        if not family:
            return frozenset(get_font(findfont(FontProperties())).get_charmap())
        file = findfont(FontProperties(family=[family]), fallback_to_default=False)
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):  # a font of bitmaps, or a damaged one
        return frozenset()
    finally:
        logger.setLevel(level)


@functools.cache
def _add_new_fonts() -> None:
    """Add fonts that were installed after matplotlib made its list."""
    listed = {font.fname for font in fontManager.ttflist}
    for file in findSystemFonts():
        if file not in listed:
            with contextlib.suppress(Exception):  # a damaged font
                fontManager.addfont(file)
