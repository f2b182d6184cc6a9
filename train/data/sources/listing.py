"""Lists of image files and their classes, in the formats in which long-tailed datasets are published."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...console import counted
from ...files import TextError
from ..errors import DataError
from .coco import read_coco
from .folders import LeftOut, read_folder
from .labels import Classes, Key, class_numbers, classes_of, integer
from .text_lists import read_csv, read_txt

SHOWN = 5  # images in a warning


@dataclass(frozen=True)
class Listing:
    """Image files and their labels, which are positions in `classes`."""

    files: list[Path]
    labels: list[int]
    classes: Classes
    left_out: tuple[LeftOut, ...] = ()  # from a folder

    def __len__(self) -> int:
        return len(self.files)


def read_listing(
    source: str, root: str = "", prefixes: tuple[str, ...] = (), trained: Listing | None = None
) -> Listing:
    """Read a `.txt` list (path label), a `.csv` with a header, COCO's `.json` (iNaturalist), or a folder of class folders.

    Args:
        source: the list's file, or the folder.
        root: the folder that the list's paths are relative to; the list's own folder if empty.
        prefixes: "OLD=NEW": replaces the prefix OLD of paths by NEW (Places-LT comes in two layouts).
        trained: the training list, whose labels of the classes are used.

    Raises:
        DataError: the list cannot be read, or it identifies classes in another way than the training list. The message
            names the file and, where possible, the line.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, trained)
    if not path.exists():
        raise DataError(f"{path}: expected an existing file, got none: the path does not exist")
    if path.suffix not in (".txt", ".csv", ".json"):
        expected = "a folder of class folders, or a list named .txt, .csv or .json"
        raise DataError(f"{path}: expected {expected}, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise DataError(f"{path}: expected an existing file, got none")
    try:
        relative, labels, classes = _read_file(path, trained)
    except OSError as error:
        raise DataError(f"{path}: expected a readable text file, got {error}") from None
    except TextError as error:
        raise DataError(str(error)) from None
    replacements = [_parse_prefix(prefix) for prefix in prefixes]
    base = Path(root) if root else path.parent
    listing = Listing([base / _replace_prefix(name, replacements) for name in relative], labels, classes)
    _warn_of_contradictions(path, listing)
    return listing


def _read_file(path: Path, trained: Listing | None) -> tuple[list[str], list[int], Classes]:
    """Return the paths and labels of a list, and its classes or those of the training list."""
    if path.suffix == ".json":
        relative, categories, classes = read_coco(path)
        _expect_images(path, relative)
        _expect_kind(path, classes, trained)
        classes = trained.classes if trained else classes
        return relative, _numbers(path, categories, classes), classes
    relative, labels = (read_csv if path.suffix == ".csv" else read_txt)(path)
    _expect_images(path, relative)
    if trained and trained.classes.kind == "name":
        return relative, _numbers(path, labels, trained.classes), trained.classes
    try:
        classes, numbers = classes_of(labels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not trained:
        _warn_of_mixed(path, labels, classes)
        return relative, numbers, classes
    _expect_kind(path, classes, trained)
    return relative, _numbers(path, labels, trained.classes), trained.classes


def _warn_of_mixed(path: Path, labels: list[str], classes: Classes) -> None:
    """Warn of names among integers, which are often missing values."""
    integers = sum(integer(name) is not None for name in classes.names)
    if classes.kind == "name" and integers:
        first = next(label for label in labels if integer(label) is None)
        warnings.warn(
            f"{path}: {integers} of {len(classes.names)} classes are integers, but {first!r} is not, so all are names",
            RuntimeWarning,
            stacklevel=2,
        )


def _warn_of_contradictions(path: Path, listing: Listing) -> None:
    """Warn of images that the list gives several labels."""
    if len(set(listing.files)) == len(listing):
        return
    labels: dict[Path, set[int]] = {}
    for file, label in zip(listing.files, listing.labels, strict=True):
        labels.setdefault(file, set()).add(label)
    contradictory = {file: found for file, found in labels.items() if len(found) > 1}
    if contradictory:
        names = [
            f"{file} ({', '.join(listing.classes.names[label] for label in sorted(found))})"
            for file, found in itertools.islice(contradictory.items(), SHOWN)
        ]
        listed = ", ".join(names) + (", …" if len(contradictory) > SHOWN else "")
        warnings.warn(
            f"{path}: labels contradict each other, {counted(len(contradictory), 'image')} with several labels: {listed}",
            RuntimeWarning,
            stacklevel=2,
        )


def _expect_images(path: Path, relative: list[str]) -> None:
    if not relative:
        raise DataError(f"{path}: expected at least one image, got none")


def _expect_kind(path: Path, classes: Classes, trained: Listing | None) -> None:
    if trained and classes.kind != trained.classes.kind:
        expected = f"classes by {trained.classes.kind}, as in the training list"
        raise DataError(f"{path}: expected {expected}, got classes by {classes.kind}")


def _numbers(path: Path, labels: Iterable[Key], classes: Classes) -> list[int]:
    try:
        return class_numbers(labels, classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_folder(path: Path, trained: Listing | None) -> Listing:
    found, left_out = read_folder(path)
    names = [name for _, name in found]
    if trained:
        classes = trained.classes
    else:
        in_order = sorted(set(names))
        classes = Classes("name", [*in_order], in_order)
    try:
        _expect_kind(path, Classes("name", [], []), trained)
        labels = _numbers(path, names, classes)
    except DataError as error:
        reasons = [str(entry) for entry in (trained.left_out if trained else ()) if entry.kind != "note"]
        raise DataError("; ".join([str(error), *(f"the training folder has {r}" for r in reasons)])) from None
    return Listing([file for file, _ in found], labels, classes, left_out)


def _parse_prefix(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise DataError(f"--path-prefixes: expected OLD=NEW, got {text!r}")
    return old, new


def _replace_prefix(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    for old, new in replacements:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
