"""Frequencies of Chinese characters, from the word list of the package jieba."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from pathlib import Path

from ..errors import DataError


def word_list() -> Path:
    """Return the path of jieba's word list. The package is not imported, as that takes a second.

    Raises:
        DataError: jieba is not installed.
    """
    spec = importlib.util.find_spec("jieba")
    if spec is None or spec.origin is None:
        raise DataError(
            "glyphs: expected the package jieba, whose word list gives the characters' frequencies, got none; "
            "install it with: pip install jieba"
        )
    return Path(spec.origin).with_name("dict.txt")


def character_frequencies(words: Path, limit: int) -> dict[str, int]:
    """Return the most frequent characters, in descending order. Ties are broken by the lower code point.

    Args:
        words: a UTF-8 file with a word, its frequency and possibly more on each line.
        limit: the number of characters.

    Returns:
        For each character the sum over words of the word's frequency times the character's occurrences in it.

    Raises:
        DataError: the file is not such a list, or it has fewer different characters.
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
