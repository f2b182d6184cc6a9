"""Numbered folders of checkpoints: the next one, the last complete one, and the removal of older ones."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

#: torch.distributed.checkpoint renames this file into place after all ranks have written and synced theirs.
METADATA = ".metadata"
_NAME = re.compile(r"checkpoint-(\d+)")


def begin(folder: Path) -> Path:
    """Remove incomplete checkpoints in `folder` and create an empty folder for the next one.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: a folder could not be created or removed.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{max(_numbers(folder), default=0) + 1}"
    for older in _numbered(folder).values():
        if not _is_complete(older):
            _remove(older)
    path.mkdir()
    return path


def finish(path: Path) -> None:
    """Make the complete checkpoint `path` durable, then remove the older ones.

    Raises:
        OSError: a folder could not be removed.
    """
    # A power failure could otherwise undo the new names, but not the removal.
    for folder in (path, path.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for older in _numbered(path.parent).values():
        if older != path:
            _remove(older)


def last_complete(folder: Path) -> Path:
    """Return the complete checkpoint of the highest number in `folder`, or `folder` if it is a complete checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or no complete checkpoint in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder with checkpoints, got {folder}, which is none")
    if _is_complete(folder):
        return folder
    numbered = _numbered(folder)
    complete = [number for number, path in numbered.items() if _is_complete(path)]
    if complete:
        return numbered[max(complete)]
    names = ", ".join(numbered[number].name for number in sorted(numbered))
    found = f"only {names} without {METADATA}, which a save left behind" if numbered else "none"
    raise FileNotFoundError(f"folder: expected a complete checkpoint in {folder}, got {found}")


def _is_complete(path: Path) -> bool:
    return (path / METADATA).is_file()


def _remove(path: Path) -> None:
    """Remove a checkpoint; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
        return
    (path / METADATA).unlink(missing_ok=True)  # first: what is left is not complete
    shutil.rmtree(path)


def _numbered(folder: Path) -> dict[int, Path]:
    """Return the folders of checkpoints, complete or not, by their numbers."""
    return {number: path for number, path in _numbers(folder).items() if path.is_dir()}


def _numbers(folder: Path) -> dict[int, Path]:
    """Return everything with the name of a checkpoint, by its number."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}
