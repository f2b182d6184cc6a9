"""Labeled samples for an evaluation: the test split of a dataset, or samples that belong to no split."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..console import counted
from .classes import text_of
from .dataset import Dataset
from .errors import DataError
from .load import ARRAYS, check_data, check_images_folder, is_list, load, load_split, read_listings
from .sources.arrays import EMBEDDED, PAIR, from_arrays, pair_of, read_arrays
from .sources.listing import Listing, read_listing
from .sources.splits import find_splits

SHOWN = 5  # classes in messages

Part = Literal["the test split", "all samples"]


@dataclass(frozen=True)
class Labeled:
    """Samples [n, …], and the position [n] int64 of each sample's class in `labels` and `names`.

    `labels` holds what the data call each class, and `names` its name. They are equal if the data have one text for a class.
    `part` says which samples of the data these are.
    """

    x: Tensor
    y: Tensor
    labels: list[str]
    names: list[str]
    part: Part
    notes: tuple[str, ...] = ()

    @property
    def is_images(self) -> bool:
        return self.x.dim() == 4


def load_labeled(config: DataConfig, workers: int | None = None) -> Labeled:
    """Load the test split that training with the same options has; or all samples, if the data have no training samples.

    Args:
        config: the options of the dataset. `data` may also be a folder of class folders, a list of labeled images, or a
            file with the arrays x and y.
        workers: the number of processes that decode images; one per processor if None.

    Raises:
        DataError: the data cannot be used. The message names the option, file or array.
    """
    path = Path(config.data)
    check_data(config)
    if is_list(config.data):
        listing, part = _listing(config)
        x, numbers, notes = load_split(config, "test", listing, workers)
        keys = list(map(text_of, listing.classes.keys))
        has_names = (
            listing.classes.kind == "COCO id"
        )  # other lists write the key of a class in one way or another
        names = list(map(text_of, listing.classes.names)) if has_names else keys
        return Labeled(x, torch.from_numpy(numbers), keys, names, part, tuple(notes))
    if config.data not in EMBEDDED and path.suffix in ARRAYS:
        arrays = read_arrays(path, PAIR)
        if "x_train" not in arrays:
            return _of_pair(path, *pair_of(path, arrays))
        return _test_split(from_arrays(path, arrays))
    return _test_split(load(config))


def _listing(config: DataConfig) -> tuple[Listing, Part]:
    """Return the list of the test images of a dataset, or the list of all images if the data is no dataset."""
    check_images_folder(config)
    path = Path(config.data)
    splits = find_splits(path)
    train = splits.get("train")
    if config.hold_out or (train is not None and (train != path or len(splits) > 1)):
        return read_listings(config)["test"], "the test split"
    return read_listing(config.data, config.images, config.path_prefixes), "all samples"


def _test_split(data: Dataset) -> Labeled:
    labels = list(data.class_labels)
    return Labeled(data.x_test, data.y_test, labels, data.class_names, "the test split", data.notes)


def _of_pair(path: Path, x: Tensor, y: np.ndarray | Tensor, names: list[str] | None) -> Labeled:
    values, positions = np.unique(np.asarray(y), return_inverse=True)
    labels = [str(value) for value in values.tolist()]
    if names is not None:
        if values[0] < 0 or values[-1] >= len(names):
            expected = f"labels of at least 0 and below {len(names)}, the number of names in classes"
            raise DataError(f"{path}: y: expected {expected}, got {labels[0]} to {labels[-1]}")
        names = [names[value] for value in values.tolist()]
    return Labeled(x, torch.from_numpy(positions.reshape(-1)), labels, names or labels, "all samples")


class ClassMatcher:
    """Finds the classes of a model by what other data call them, never by their position.

    A class with the same label and the same name is the class. Otherwise, a name is that of the class with this name, and a text
    of data without names is the label or the name of a class. Texts are compared in Unicode's normalization form C, as the
    names of folders may have another one.

    Args:
        labels, names: the label and the name of each class of the model.
    """

    def __init__(self, labels: list[str], names: list[str]) -> None:
        self.labels, self.names = labels, names
        self._pairs: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._by_name: dict[str, set[int]] = defaultdict(set)
        self._by_text: dict[str, set[int]] = defaultdict(set)
        for k, (label, name) in enumerate(zip(map(normalized, labels), map(normalized, names), strict=True)):
            self._pairs[label, name].add(k)
            self._by_name[name].add(k)
            self._by_text[name].add(k)
            self._by_text[label].add(k)

    def find(self, label: str, name: str | None = None) -> int | None:
        """Return the number of a class in the model; None if the model lacks the class.

        Args:
            label: the text that stands for the class in the data.
            name: its name; None if the data have one text for a class.

        Raises:
            DataError: several classes of the model have the text.
        """
        label, text = normalized(label), normalized(label if name is None else name)
        found = self._pairs.get((label, text)) or (self._by_text if name is None else self._by_name).get(text)
        if found and len(found) > 1:
            same = ", ".join(f"{self.names[k]!r} (label {self.labels[k]})" for k in sorted(found))
            raise DataError(
                f"expected a text that stands for one class of the model, got {text!r}, which fits {same}"
            )
        return next(iter(found)) if found else None

    def describe(self) -> str:
        """Return the first names of the model's classes."""
        return listed(self.names)


def normalized(text: str) -> str:
    """Return a text in Unicode's normalization form C."""
    return unicodedata.normalize("NFC", text)


def listed(texts: Iterable[str]) -> str:
    """Return the first texts, with a comma between them."""
    texts = list(texts)
    return ", ".join(texts[:SHOWN]) + (", …" if len(texts) > SHOWN else "")


@dataclass(frozen=True)
class Matched:
    """Samples [n, …], their classes in the model [n] int64, and the number of samples of each class that was left out."""

    x: Tensor
    y: Tensor
    skipped: dict[str, int]


def match(data: Labeled, matcher: ClassMatcher, *, skip_unknown: bool) -> Matched:
    """Number the classes of samples as the model does.

    Args:
        data: the samples.
        matcher: finds the classes of the model.
        skip_unknown: leave out samples of classes that the model lacks, instead of an error.

    Raises:
        DataError: a class is unknown or ambiguous, two classes are called the same, or no sample is left.
    """
    count = torch.bincount(data.y, minlength=len(data.labels)).tolist()
    numbers = torch.full((len(data.labels),), -1)
    unknown: dict[str, int] = {}
    found: dict[int, str] = {}  # the label in the data of each class of the model
    has_names = data.names != data.labels
    for position, (label, name) in enumerate(zip(data.labels, data.names, strict=True)):
        if not count[position]:
            continue
        number = matcher.find(label, name if has_names else None)
        if number is None:
            unknown[name] = unknown.get(name, 0) + count[position]
            continue
        if number in found:
            got = f"two, with the labels {found[number]} and {label}"
            raise DataError(f"expected one class that is called {matcher.names[number]!r}, got {got}")
        numbers[position], found[number] = number, label
    y = numbers[data.y]
    kept = y >= 0
    if unknown and not (skip_unknown and kept.any()):
        expected = f"classes that the model has, such as {matcher.describe()}"
        advice = "" if skip_unknown else " (--unknown skip leaves their samples out)"
        raise DataError(
            f"expected {expected}, got {counted(len(unknown), 'other')}: {listed(unknown)}{advice}"
        )
    return Matched(data.x if not unknown else data.x[kept], y[kept], unknown)
