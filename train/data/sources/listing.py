"""Lists of image files and their classes, in the formats in which long-tailed datasets are published."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .folders import LeftOut, read_folder

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "category", "target", "category_id")


@dataclass(frozen=True)
class Listing:
    """Image files and their labels. A label is an index into `names` or `ids` if the list has them."""

    files: list[Path]
    labels: list[int]
    names: list[str] | None = None
    ids: list[int] | None = None
    left_out: tuple[LeftOut, ...] = ()  # from a folder

    def __len__(self) -> int:
        return len(self.files)

    @property
    def class_key(self) -> str:
        """The kind of key by which the list identifies classes."""
        return "name" if self.names is not None else "COCO id" if self.ids is not None else "number"


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
    listing = _read(source, root, prefixes, trained)
    if trained and listing.class_key != trained.class_key:
        expected = f"classes by {trained.class_key}, as in the training list"
        raise DataError(f"{source}: expected {expected}, got classes by {listing.class_key}")
    return listing


def _read(source: str, root: str, prefixes: tuple[str, ...], trained: Listing | None) -> Listing:
    path = Path(source)
    names = trained.names if trained else None
    if path.is_dir():
        return _read_folder(path, trained)
    readers: dict[str, Callable[[Path], tuple[list[str], list[str]]]] = {
        ".txt": _read_text,
        ".csv": _read_csv,
    }
    if path.suffix not in (*readers, ".json"):
        expected = "a folder of class folders, or a list named .txt, .csv or .json"
        raise DataError(f"{path}: expected {expected}, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise DataError(f"{path}: expected an existing file, got none")
    try:
        if path.suffix == ".json":
            relative, categories, ids = _read_coco(path)
            labels: list[str] = []
        else:
            (relative, labels), categories = readers[path.suffix](path), None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable text file, got {error}") from None
    if not relative:
        raise DataError(f"{path}: expected at least one image, got none")
    replacements = [_parse_prefix(prefix) for prefix in prefixes]
    base = Path(root) if root else path.parent
    files = [base / _replace_prefix(name, replacements) for name in relative]
    if categories is not None:
        ids = trained.ids if trained and trained.ids else ids
        labels_of_ids = {category: label for label, category in enumerate(ids)}
        if unknown := sorted(set(categories) - set(ids)):
            raise DataError(
                f"{path}: expected only categories of the training list, got the categories {unknown[:5]} too"
            )
        return Listing(files, [labels_of_ids[category] for category in categories], ids=ids)
    if names is None and all(label.isdecimal() for label in labels):
        return Listing(files, [int(label) for label in labels])
    return _label_by_name(path, files, labels, names)


def _read_text(path: Path) -> tuple[list[str], list[str]]:
    names: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f"{path}, line {number}: expected `relative/path.jpg label`, got {line!r}")
        names.append(words[0].strip())
        labels.append(words[1])
    return names, labels


def _read_csv(path: Path) -> tuple[list[str], list[str]]:
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        header = list(rows.fieldnames or [])
        columns = [
            next((name for name in choice if name in header), None)
            for choice in (PATH_COLUMNS, LABEL_COLUMNS)
        ]
        if None in columns:
            expected = f"one of the columns {', '.join(PATH_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
            raise DataError(f"{path}: expected {expected}, got {', '.join(header) or 'no header'}")
        names, labels = [], []
        for row in rows:
            name, label = (row[column] for column in columns if column)
            if not name or not label:
                raise DataError(f"{path}, line {rows.line_num}: expected a path and a label, got {row}")
            names.append(name)
            labels.append(label)
    return names, labels


def _read_coco(path: Path) -> tuple[list[str], list[int], list[int]]:
    """Return the images' paths, the ids of their categories, and the sorted ids of all categories."""
    try:
        content = json.loads(path.read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(note["image_id"], note["category_id"]) for note in content["annotations"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        expected = "COCO's images (id, file_name) and annotations (image_id, category_id)"
        raise DataError(f"{path}: expected {expected}, got {type(error).__name__}: {error}") from None
    if missing := [image for image, _ in pairs if image not in files]:
        raise DataError(f"{path}: expected an image for each annotation, got none with id {missing[0]}")
    categories = {category for _, category in pairs} | {c["id"] for c in content.get("categories", [])}
    return [files[image] for image, _ in pairs], [category for _, category in pairs], sorted(categories)


def _read_folder(path: Path, trained: Listing | None) -> Listing:
    found, left_out = read_folder(path)
    names = trained.names if trained else None
    try:
        listing = _label_by_name(path, [file for file, _ in found], [name for _, name in found], names)
    except DataError as error:
        reasons = [str(entry) for entry in (trained.left_out if trained else ()) if entry.kind != "note"]
        raise DataError("; ".join([str(error), *(f"the training folder has {r}" for r in reasons)])) from None
    return dataclasses.replace(listing, left_out=left_out)


def _label_by_name(path: Path, files: list[Path], classes: list[str], names: list[str] | None) -> Listing:
    names = sorted(set(classes)) if names is None else names
    labels = {name: label for label, name in enumerate(names)}
    if unknown := sorted(set(classes) - set(names)):
        raise DataError(
            f"{path}: expected only classes of the training list, got the classes {', '.join(unknown[:5])} too"
        )
    return Listing(files, [labels[name] for name in classes], names)


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
