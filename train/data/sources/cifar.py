"""CIFAR-10 and CIFAR-100, read from the archives that their authors publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .archive import read_members
from .plain_pickle import PickleError, read_plain_pickle

PIXELS = 3 * 32 * 32
MAX_CLASSES, MAX_NAME = 1000, 100  # bounds on memory, far above CIFAR's


class Layout(NamedTuple):
    """The files of an archive, and the keys of its dictionaries."""

    training: list[str]
    test: str
    meta: str
    labels: str
    names: str


#: Folder in the archive -> its layout.
LAYOUTS = {
    "cifar-100-python": Layout(["train"], "test", "meta", "fine_labels", "fine_label_names"),
    "cifar-10-batches-py": Layout(
        [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "labels", "label_names"
    ),
}


def read_cifar(path: Path) -> dict[str, np.ndarray]:
    """Read `cifar-100-python.tar.gz` or `cifar-10-python.tar.gz`.

    Nothing in the archive is run: its pickles can hold nothing but text, integers and uint8 arrays.

    Returns:
        The arrays that `arrays.ARRAYS` names, and `classes`.

    Raises:
        DataError: the file is not one of these archives, or is damaged.
    """
    wanted = {
        f"{folder}/{name}"
        for folder, layout in LAYOUTS.items()
        for name in (*layout.training, layout.test, layout.meta)
    }
    contents, members = read_members(path, wanted.__contains__)
    folders = dict.fromkeys(name.split("/")[0] for name in members)
    folder = next((folder for folder in folders if folder in LAYOUTS), None)
    if folder is None:
        expected = f"an archive with the folder {' or '.join(LAYOUTS)}"
        raise DataError(f"{path}: expected {expected}, got {', '.join(list(folders)[:3]) or 'none'}")
    layout = LAYOUTS[folder]
    try:
        classes = _class_names(f"{folder}/{layout.meta}", contents, layout.names)
        batches = [
            _batch(f"{folder}/{name}", contents, layout.labels, len(classes)) for name in layout.training
        ]
        x_test, y_test = _batch(f"{folder}/{layout.test}", contents, layout.labels, len(classes))
    except PickleError as error:
        raise DataError(f"{path}: expected the files and keys of CIFAR's archive, got {error}") from None
    return {
        "x_train": np.concatenate([x for x, _ in batches]),
        "y_train": np.concatenate([y for _, y in batches]),
        "x_test": x_test,
        "y_test": y_test,
        "classes": np.asarray(classes),
    }


def _unpickle(name: str, contents: dict[str, bytes], *keys: str) -> list[Any]:
    """Take a file out of `contents`, so that its memory is free, and return the values of keys of its dictionary."""
    if name not in contents:
        raise PickleError(f"no file {name}")
    try:
        content = read_plain_pickle(contents.pop(name))
    except PickleError as error:
        raise PickleError(f"{error}, in {name}") from None
    if not isinstance(content, dict):
        raise PickleError(f"{name} of the type {type(content).__name__} instead of a dictionary")
    if missing := [key for key in keys if key not in content]:
        raise PickleError(f"no {missing[0]!r} in {name}")
    return [content[key] for key in keys]


def _class_names(name: str, contents: dict[str, bytes], key: str) -> list[str]:
    (names,) = _unpickle(name, contents, key)
    if not isinstance(names, list) or not 0 < len(names) <= MAX_CLASSES:
        raise PickleError(f"{key!r} in {name} that is not a list of 1 to {MAX_CLASSES} names")
    if not all(isinstance(text, str | bytes) and len(text) <= MAX_NAME for text in names):
        raise PickleError(f"{key!r} in {name} with an entry that is not a name")
    return [text if isinstance(text, str) else text.decode("utf-8", "backslashreplace") for text in names]


def _batch(
    name: str, contents: dict[str, bytes], key: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [n, 32, 32, 3] and the labels [n] of a batch."""
    pixels, labels = _unpickle(name, contents, "data", key)
    if not isinstance(pixels, np.ndarray):
        raise PickleError(
            f"'data' in {name} of the type {type(pixels).__name__} instead of uint8 [n, {PIXELS}]"
        )
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise PickleError(f"'data' in {name} of the shape {list(pixels.shape)} instead of [n, {PIXELS}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise PickleError(f"{key!r} in {name} that is not a list of integers")
    if len(labels) != len(pixels):
        raise PickleError(f"{len(labels)} labels for {len(pixels)} images in {name}")
    if not all(0 <= label < num_classes for label in labels):
        raise PickleError(f"a label outside of 0 to {num_classes - 1} in {name}")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)
