"""Atomic file writes, text files that users write, and errors that name the file."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


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


class WriteError(OSError):
    """A file cannot be written. The message names the file and the reason."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is complete or absent, even if the process is killed or the power fails.

    Args:
        path: the file.
        write: called with a temporary path in the same folder, where it writes the content.

    Raises:
        WriteError: the disk is full, or the folder cannot be written to. The previous content remains.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if reason := _reason(error):
            raise WriteError(f"{path}: {reason}") from error
        raise
    sync_folder(path.parent)  # otherwise a power failure could undo the rename


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; the whole line or nothing.

    Raises:
        WriteError: the disk is full, or the file cannot be written to.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            start, content = file.tell(), f"{line}\n".encode()
            try:
                if file.write(content) < len(content):
                    raise OSError("no space is left for the line")
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise WriteError(f"{path}: {_reason(error)}") from error


class _Lines:
    """A file in which rows of the module csv end with a line feed alone."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: TextIO) -> Any:
    """Return a writer of the module csv that accepts all text, null characters and carriage returns included."""
    # Before Python 3.13 carriage returns are quoted only if the line terminator has one, and readers would end the row there.
    # Python 3.10 refuses null characters unless there is an escape character. Texts in UTF-8 do not have this one.
    return csv.writer(_Lines(file), lineterminator="\r\n", escapechar="\udfff")


def check_writable(folder: Path) -> None:
    """Check that this user may create files in a folder.

    Raises:
        PermissionError: the user may not.
    """
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def existing_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists.

    Raises:
        NotADirectoryError: a file, or a link to nothing, is in the place of a folder.
    """
    path = path.absolute()
    while not os.path.isdir(path) and path != path.parent:  # False where this user may not look
        if os.path.lexists(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        path = path.parent
    return path


def _reason(error: BaseException | None) -> str:
    """Return the reason of an OSError, also of one that led to another error; an empty string if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return "" if error is None else error.strerror or str(error)
