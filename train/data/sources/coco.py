"""Lists of image files in COCO's format, as iNaturalist publishes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ...console import counted
from ...files import read_text
from ..errors import DataError
from .labels import Classes, Key, identity, in_order
from .text_lists import checked_path


def read_coco(path: Path) -> tuple[list[str], list[Key], Classes]:
    """Return the path and the category of each annotation, and all categories in the order of their ids.

    Ids may be integers or text (see `labels.identity`). Without `categories`, the categories are those of the annotations.
    Classes have the names of their categories if each category has a name of its own, and otherwise their ids.

    Raises:
        DataError: the file is not JSON, or a field is missing or of another type. The message names the field.
    """
    text = read_text(path)
    try:
        return _read(path, json.loads(text))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: expected COCO's format, got JSON with too many levels") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: expected JSON, got {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{path}: expected COCO's format, got {error}") from None


def _read(path: Path, content: Any) -> tuple[list[str], list[Key], Classes]:
    if not isinstance(content, dict):
        raise DataError(f"expected an object with images and annotations, got {_describe(content)}")
    files: dict[Key, str] = {}
    for where, image in _entries(content, "images"):
        key = _id(where, image, "id")
        if key in files:
            raise DataError(f"{where}.id: expected one image of each id, got a second one of the id {key!r}")
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}.file_name: expected a path, got {_describe(name)}")
        files[key] = checked_path(f"{where}.file_name", name)
    notes = [
        (where, _id(where, note, "image_id"), _id(where, note, "category_id"))
        for where, note in _entries(content, "annotations")
    ]
    for where, image_id, _ in notes:
        if image_id not in files:
            raise DataError(
                f"{where}.image_id: expected the id of an image, got {image_id!r}, which no image has"
            )
    names: dict[Key, object] = {}
    for where, category in _entries(content, "categories") if content.get("categories") is not None else ():
        key = _id(where, category, "id")
        if key in names:
            raise DataError(
                f"{where}.id: expected one category of each id, got a second one of the id {key!r}"
            )
        names[key] = category.get("name")
    if unlabeled := len(files) - len({image_id for _, image_id, _ in notes}):
        warnings.warn(
            f"{path}: left out {unlabeled:,} of {counted(len(files), 'image')} without an annotation",
            RuntimeWarning,
            stacklevel=2,
        )
    keys = in_order([*names, *(category for _, _, category in notes)])
    has_names = all(isinstance(names.get(key), str) and names[key] for key in keys)
    has_own_names = has_names and len(set(names.values())) == len(keys)
    classes = Classes("COCO id", keys, [str(names[key] if has_own_names else key) for key in keys])
    return [files[image] for _, image, _ in notes], [category for _, _, category in notes], classes


def _entries(content: dict[str, Any], field: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with its place for messages."""
    entries = content.get(field)
    if not isinstance(entries, list):
        raise DataError(f"{field}: expected a list of objects, got {_describe(entries)}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{field}[{number}]: expected an object, got {_describe(entry)}")
    return [(f"{field}[{number}]", entry) for number, entry in enumerate(entries)]


def _id(where: str, entry: dict[str, Any], field: str) -> Key:
    key = identity(entry.get(field))
    if key is None:
        raise DataError(f"{where}.{field}: expected an integer or text, got {_describe(entry.get(field))}")
    return key


def _describe(value: object) -> str:
    """Describe a value of JSON in a few words."""
    text = json.dumps(value, default=str)
    return "nothing" if value is None else text if len(text) <= 40 else f"{text[:40]}…"
