"""Lists of image files as text: `.txt` and `.csv`."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ...files import read_text
from ..errors import DataError
from .labels import integer

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "category", "target", "category_id")


def read_txt(path: Path) -> tuple[list[str], list[str]]:
    """Return the paths and the labels of a list with a path and an integer label per line. Paths may have blanks."""
    names: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or integer(words[1]) is None:
            got = repr(line.rstrip("\n"))
            raise DataError(
                f"{path}, line {number}: expected `relative/path.jpg label` with an integer label, got {got}"
            )
        names.append(checked_path(f"{path}, line {number}", words[0].strip()))
        labels.append(words[1])
    return names, labels


def read_csv(path: Path) -> tuple[list[str], list[str]]:
    """Return the paths and the labels of a list with a header. Blanks around fields are removed."""
    records = _records(path, read_text(path))
    _, header = next(records, (0, []))
    columns = [
        next((header.index(name) for name in choice if name in header), -1)
        for choice in (PATH_COLUMNS, LABEL_COLUMNS)
    ]
    if -1 in columns:
        expected = f"a header in the first line, with one of the columns {', '.join(PATH_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
        raise DataError(f"{path}: expected {expected}, got {', '.join(header) or 'no header'}")
    if repeated := [header[column] for column in columns if header.count(header[column]) > 1]:
        raise DataError(f"{path}: expected one column {repeated[0]}, got several")
    names, labels = [], []
    for line, row in records:
        if any(row[len(header) :]):
            expected = f"{len(header)} fields as in the header"
            raise DataError(
                f"{path}, line {line}: expected {expected}, got {len(row)} (a field with a comma needs quotes)"
            )
        name, label = (row[column] if column < len(row) else "" for column in columns)
        if not name or not label:
            raise DataError(f"{path}, line {line}: expected a path and a label, got {', '.join(row)!r}")
        names.append(checked_path(f"{path}, line {line}", name))
        labels.append(unicodedata.normalize("NFC", label))  # as the names of class folders
    return names, labels


def _records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the fields of each record."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: expected a record of CSV, got {error}") from None
        if any("\n" in field or "\r" in field for field in row):
            raise DataError(f"{path}, line {line}: expected a closing quote in the line, got none")
        if any(field.strip() for field in row):
            yield line, [field.strip() for field in row]


def checked_path(where: str, name: str) -> str:
    """Return a path from a list.

    Raises:
        DataError: no file can have this path. The message begins with `where`.
    """
    try:
        os.fsencode(name)
        valid = "\0" not in name
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise DataError(f"{where}: expected the path of a file, got {name!a}")
    return name
