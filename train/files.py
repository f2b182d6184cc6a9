"""Atomic file writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
