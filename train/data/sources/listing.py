"""Lists of images and their classes, in the forms in which long-tailed sets are published."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
PATHS = ("path", "file", "filename", "file_name", "image")
LABELS = ("label", "class", "category", "target", "category_id")


@dataclass(frozen=True)
class Listing:
    """Image files, and each one's class: its place in `names` or in `ids`, where the list has such."""

    files: list[Path]
    labels: list[int]
    names: list[str] | None = None
    ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> str:
        """What the list knows its classes by."""
        return "name" if self.names is not None else "COCO id" if self.ids is not None else "number"


def read_listing(
    source: str, root: str = "", prefixes: tuple[str, ...] = (), trained: Listing | None = None
) -> Listing:
    """Read a list: `.txt` (path label), `.csv` with a header, COCO's `.json` (iNaturalist), or a folder of class folders.

    Args:
        source: the list's file, or the folder.
        root: where the paths in it begin; the list's own folder if empty.
        prefixes: "OLD=NEW": paths that begin with OLD begin with NEW instead (Places-LT comes in two layouts).
        trained: the training list, whose classes keep their numbers.

    Raises:
        DataError: it cannot be read, or names classes otherwise than the training list; the message names the file and
            the line.
    """
    listing = _read(source, root, prefixes, trained)
    if trained and listing.classes != trained.classes:
        expected = f"classes by {trained.classes}, as in the training list"
        raise DataError(f"{source}: expected {expected}, got classes by {listing.classes}")
    return listing


def _read(source: str, root: str, prefixes: tuple[str, ...], trained: Listing | None) -> Listing:
    path = Path(source)
    names = trained.names if trained else None
    if path.is_dir():
        return _folder(path, names)
    readers: dict[str, Callable[[Path], tuple[list[str], list[str]]]] = {".txt": _text, ".csv": _csv}
    if path.suffix not in (*readers, ".json"):
        expected = "a folder of class folders, or a list named .txt, .csv or .json"
        raise DataError(f"{path}: expected {expected}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        if path.suffix == ".json":
            relative, categories, ids = _coco(path)
            labels: list[str] = []
        else:
            (relative, labels), categories = readers[path.suffix](path), None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable text file, got {error}") from None
    if not relative:
        raise DataError(f"{path}: expected some images, got none")
    changes = [_prefix(prefix) for prefix in prefixes]
    base = Path(root) if root else path.parent
    files = [base / _moved(name, changes) for name in relative]
    if categories is not None:
        ids = trained.ids if trained and trained.ids else ids
        numbers = {category: number for number, category in enumerate(ids)}
        if unknown := sorted(set(categories) - set(ids)):
            raise DataError(f"{path}: expected the training set's categories, got {unknown[:5]} too")
        return Listing(files, [numbers[category] for category in categories], ids=ids)
    if names is None and all(label.isdecimal() for label in labels):
        return Listing(files, [int(label) for label in labels])
    return _numbered(path, files, labels, names)


def _text(path: Path) -> tuple[list[str], list[str]]:
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


def _csv(path: Path) -> tuple[list[str], list[str]]:
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        header = list(rows.fieldnames or [])
        columns = [next((name for name in choice if name in header), None) for choice in (PATHS, LABELS)]
        if None in columns:
            wanted = f"a column named {', '.join(PATHS)} and one named {', '.join(LABELS)}"
            raise DataError(f"{path}: expected {wanted}, got {', '.join(header) or 'no header'}")
        names, labels = [], []
        for row in rows:
            name, label = (row[column] for column in columns if column)
            if not name or not label:
                raise DataError(f"{path}, line {rows.line_num}: expected a path and a label, got {row}")
            names.append(name)
            labels.append(label)
    return names, labels


def _coco(path: Path) -> tuple[list[str], list[int], list[int]]:
    """Paths, their categories' ids, and the ids of all categories in order."""
    try:
        content = json.loads(path.read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(note["image_id"], note["category_id"]) for note in content["annotations"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        expected = "COCO's images (id, file_name) and annotations (image_id, category_id)"
        raise DataError(f"{path}: expected {expected}, got {type(error).__name__}: {error}") from None
    if lost := [image for image, _ in pairs if image not in files]:
        raise DataError(f"{path}: expected an image for each annotation, got none with id {lost[0]}")
    known = sorted({category for _, category in pairs} | {c["id"] for c in content.get("categories", [])})
    return [files[image] for image, _ in pairs], [category for _, category in pairs], known


def _folder(path: Path, names: list[str] | None) -> Listing:
    found = [
        (file, folder.name)
        for folder in sorted(entry for entry in path.iterdir() if entry.is_dir())
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not found:
        raise DataError(f"{path}: expected a folder for each class with images in it, got none")
    return _numbered(path, [file for file, _ in found], [label for _, label in found], names)


def _numbered(path: Path, files: list[Path], labels: list[str], names: list[str] | None) -> Listing:
    names = sorted(set(labels)) if names is None else names
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted(set(labels) - set(names)):
        raise DataError(f"{path}: expected the training set's classes, got {', '.join(unknown[:5])} too")
    return Listing(files, [numbers[label] for label in labels], names)


def _prefix(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise DataError(f"--path-prefixes: expected OLD=NEW, got {text!r}")
    return old, new


def _moved(name: str, changes: Iterable[tuple[str, str]]) -> str:
    for old, new in changes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
