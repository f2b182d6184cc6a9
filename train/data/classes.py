"""The numbering of classes: labels of any value become 0 to K-1, and the mapping is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..console import counted
from .errors import DataError

SHOWN = 5  # classes in a note

Labels = np.ndarray | Tensor  # [n], any integer type


class Numbering(NamedTuple):
    """Labels by class number, and the classes."""

    labels: dict[str, Tensor]
    """Split -> class numbers [n] int64."""
    sources: list[str]
    """The label of each class in the data or, in a list, its key."""
    names: list[str]
    """The name of each class in reports."""
    notes: list[str]


def number_classes(
    labels: Mapping[str, Labels], names: Sequence[object] | None, sources: Sequence[object] | None = None
) -> Numbering:
    """Number the classes that have training samples, in the order of their labels.

    Classes without training samples are left out, wherever they stand. Memory depends on the number of labels, not on their
    values.

    Args:
        labels: the labels of each split. With names they are positions in `names`, otherwise any integers.
        names: the names of all classes.
        sources: what the data call each class; the labels if None.

    Raises:
        DataError: a label has no name, or another split has a class without training samples.
    """
    found = {split: _unique(y) for split, y in labels.items()}
    values = found["train"][0]
    if names is not None:
        _check_names(found, len(names))
    numbers = {value: number for number, value in enumerate(values)}
    for split, (others, _) in found.items():
        if unknown := [value for value in others if value not in numbers]:
            listed = _listed(_texts(unknown, names))
            raise DataError(f"y_{split}: expected only classes that y_train has, got {listed} too")
    numbered = {
        split: torch.from_numpy(np.array([numbers[value] for value in others], np.int64)[positions])
        for split, (others, positions) in found.items()
    }
    numbering = Numbering(numbered, _texts(values, sources), _texts(values, names), [])
    if any(label.lstrip("-").isdecimal() for label in numbering.sources):
        numbering.notes.extend(_mapping(numbering))
    if names is not None and (absent := sorted(set(range(len(names))) - set(values))):
        numbering.notes.append(
            f"left out {counted(len(absent), 'class', 'classes')} without training samples: {_listed(_texts(absent, names))}"
        )
    return numbering


def _texts(values: Sequence[int], texts: Sequence[object] | None) -> list[str]:
    """Return the text of each value, or the value itself. No file could be written with bytes that are no text."""
    return [text_of(value if texts is None else texts[value]) for value in values]


def text_of(value: object) -> str:
    """Return a value as text in which bytes of a file name that are no text are written out."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _mapping(numbering: Numbering) -> list[str]:
    """Describe the mapping in one line if it is not the identity."""
    if numbering.sources == [str(number) for number in range(len(numbering.sources))]:
        return []
    pairs = zip(numbering.sources, numbering.names, strict=True)
    shown = [label if label == name else f"{label} ({name})" for label, name in pairs]
    listed = _listed([f"{label} is class {number}" for number, label in enumerate(shown)])
    return [f"labels are numbered in their order: {listed}"]


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", …" if len(texts) > SHOWN else "")


def _unique(labels: Labels) -> tuple[list[int], np.ndarray]:
    """Return the labels without repetition as Python integers, in order, and the position of each label among them."""
    array = labels.numpy() if isinstance(labels, Tensor) else labels
    values, positions = np.unique(array, return_inverse=True)
    return values.tolist(), positions.reshape(-1)


def _check_names(found: Mapping[str, tuple[list[int], np.ndarray]], count: int) -> None:
    for split, (values, _) in found.items():
        if values[0] < 0:
            raise DataError(
                f"y_{split}: expected labels of at least 0, as classes have names, got {values[0]}"
            )
        if values[-1] >= count and split == "train":
            raise DataError(
                f"classes: expected {counted(values[-1] + 1, 'name')} to match y_train, got {count}"
            )
        if values[-1] >= count:
            raise DataError(
                f"y_{split}: expected labels below {count}, the number of names, got {values[-1]}"
            )
