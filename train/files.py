"""Atomic file writes, and text files that users write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class TextError(ValueError):
    """A file that is not text in UTF-8. The message names the file and the line."""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
        OSError: the file cannot be read.
        TextError: the file has another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b".").splitlines())
        byte = error.object[error.start]
        raise TextError(f"{path}, line {line}: expected text in UTF-8, got the byte 0x{byte:02x}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is complete or absent, even if the process is killed or the power fails.

    Args:
        path: the file.
        write: called with a temporary path in the same folder, where it writes the content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a power failure could undo the rename
    finally:
        os.close(folder)
