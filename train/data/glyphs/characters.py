"""Chinese characters by how often they are written, from the word list of the package jieba."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from pathlib import Path

from ..errors import DataError


def word_list() -> Path:
    """jieba's list of words; the package is only looked for, as importing it takes a second.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec("jieba")
    if found is None or found.origin is None:
        raise DataError(
            "glyphs: expected jieba, whose word list says how frequent characters are; to install it: pip install jieba"
        )
    return Path(found.origin).with_name("dict.txt")


def character_frequencies(words: Path, limit: int) -> dict[str, int]:
    """The most frequent characters, the most frequent first; of equals the one with the lower code point.

    Args:
        words: lines of a word, its frequency, and anything more, in UTF-8.
        limit: how many characters.

    Returns:
        For each character the sum over words of the word's frequency times the character's occurrences in it.

    Raises:
        DataError: the file cannot be read as such, or holds fewer ideographs.
    """
    frequencies: Counter[str] = Counter()
    try:
        for line in words.read_text(encoding="utf-8").splitlines():
            word, frequency, *_ = line.split(" ")
            for character in word:
                frequencies[character] += int(frequency)
    except (OSError, ValueError) as error:
        raise DataError(f"{words}: expected lines of a word and its frequency, got {error}") from None
    ideographs = [(c, n) for c, n in frequencies.items() if n > 0 and _is_ideograph(c)]
    if len(ideographs) < limit:
        raise DataError(f"{words}: expected {limit:,} different Chinese characters, got {len(ideographs):,}")
    return dict(sorted(ideographs, key=lambda pair: (-pair[1], pair[0]))[:limit])


def _is_ideograph(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")
