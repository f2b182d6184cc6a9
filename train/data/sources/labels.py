"""Labels in lists: integers or names, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import DataError

Key = int | str
Kind = Literal["number", "name", "COCO id"]

_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


@dataclass(frozen=True)
class Classes:
    """The classes of a list, in the order of their labels.

    Args:
        kind: how the list identifies classes.
        keys: the identity of each class: an integer, a name or an id.
        names: the names for reports.
    """

    kind: Kind
    keys: list[Key]
    names: list[str]


def integer(text: str) -> int | None:
    """Return the integer that a label such as 7, -1, +7 or 3.0 is, or None if it is text."""
    if not _INTEGER.fullmatch(text):
        return None
    try:
        return int(text.partition(".")[0])
    except ValueError:  # over 4,300 digits
        return None


def plain(text: str) -> str:
    """Return a label without the sign and the decimals that a program may add to an integer: 3.0 is 3."""
    return text if integer(text) is None else text.partition(".")[0].removeprefix("+")


def identity(value: object) -> Key | None:
    """Return the key that an id in JSON stands for, or None if the value is no id.

    Ids are integers or text. Text that is an integer as JSON writes it is that integer, so "7" and 7 are one id, and so is
    7.0; "007" is text.
    """
    if isinstance(value, str):
        short = len(value) < 1000 and _PLAIN_INTEGER.fullmatch(value)
        return int(value) if short else value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Return keys without repetition: integers by value, then text by the alphabet."""
    return sorted(
        set(keys), key=lambda key: (isinstance(key, str), key if isinstance(key, int) else 0, str(key))
    )


def classes_of(labels: list[str]) -> tuple[Classes, list[int]]:
    """Return the classes of a training list and the labels as class numbers.

    If all labels are integers, classes are ordered by value. Otherwise all labels are names, and those that are integers
    come first, by value. Memory depends on the number of labels, not on their values.

    Raises:
        DataError: an integer is written in two ways, such as 3 and 03.
    """
    spelled: dict[Key, str] = {}  # integers or text -> how the list writes it
    for text in dict.fromkeys(labels):
        number = integer(text)
        key = text if number is None else number
        if spelled.setdefault(key, plain(text)) != plain(text):
            raise DataError(f"expected one spelling of each label, got {spelled[key]} and {plain(text)}")
    keys = in_order(spelled)
    names = [spelled[key] for key in keys]
    if all(isinstance(key, int) for key in keys):
        classes = Classes("number", keys, names)
    else:
        classes = Classes("name", list(names), names)
    return classes, class_numbers(labels, classes)


def class_numbers(labels: Iterable[Key], classes: Classes) -> list[int]:
    """Return the number of the class that each label names.

    Raises:
        DataError: labels of classes that the training list does not have.
    """
    numbers: dict[Key | None, int] = {key: number for number, key in enumerate(classes.keys)}

    def find(label: Key) -> int | None:
        if isinstance(label, int) or classes.kind == "COCO id":
            return numbers.get(label)
        if classes.kind == "number":
            return numbers.get(integer(label))
        return numbers.get(label, numbers.get(plain(label)))

    found = {label: find(label) for label in dict.fromkeys(labels)}
    if unknown := [label for label, number in found.items() if number is None]:
        listed = ", ".join(map(str, in_order(unknown)[:5])) + (", …" if len(unknown) > 5 else "")
        raise DataError(f"expected only classes of the training list, got the classes {listed} too")
    return [found[label] or 0 for label in labels]
