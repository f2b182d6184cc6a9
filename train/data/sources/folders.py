"""Folders with a folder of images per class: the images in them, and what is left out and why."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...console import counted
from ..errors import DataError
from .image_files import SUFFIXES

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
SHOWN = 5  # names per reason

Kind = Literal["note", "problem", "unreadable"]
#: What is left out -> its kind. A note is expected in good data. A problem is probably a mistake.
KINDS: dict[str, Kind] = {
    "hidden files and folders": "note",
    "files without the suffix of an image": "note",
    "images outside of the class folders": "problem",
    "class folders without images, which are no classes": "problem",
    "links to folders that are read already": "problem",
    "broken links": "problem",
    "devices, pipes and sockets": "problem",
    "folders that cannot be read": "unreadable",
}
#: What is left out, if it is a single entry.
SINGULAR = (
    "hidden file or folder",
    "file without the suffix of an image",
    "image outside of the class folders",
    "class folder without images, which is no class",
    "link to a folder that is read already",
    "broken link",
    "device, pipe or socket",
    "folder that cannot be read",
)
HIDDEN, OTHER, OUTSIDE, EMPTY, REPEATED, BROKEN, SPECIAL, UNREADABLE = KINDS


@dataclass(frozen=True)
class LeftOut:
    """Entries of a folder that are left out for one reason."""

    reason: str
    names: tuple[str, ...]
    count: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.reason]

    def __str__(self) -> str:
        listed = ", ".join(self.names[:SHOWN]) + (", …" if len(self.names) > SHOWN else "")
        singular = dict(zip(KINDS, SINGULAR, strict=True))[self.reason]
        return f"{counted(self.count, singular, self.reason)}: {listed}"


def read_folder(path: Path) -> tuple[list[tuple[Path, str]], tuple[LeftOut, ...]]:
    """Return the images below a folder of class folders with their class, and what was left out.

    Class folders may have subfolders, and links to folders are followed. Hidden entries are left out. An image is a file
    whose suffix Pillow knows, whatever its content.

    Raises:
        DataError: the folder cannot be read, or has no images.
    """
    walk = _Walk(path)
    left_out = walk.left_out()
    if reason := walk.unreadable.get(path):
        raise DataError(f"{path}: expected a folder that can be read, got {reason}")
    if not walk.images:
        got = "; ".join(map(str, left_out)) or "none"
        raise DataError(f"{path}: expected a folder with images for each class, got {got}")
    return walk.images, left_out


class _Walk:
    """A walk through all class folders, in the order of names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[tuple[Path, str]] = []
        self.unreadable: dict[Path, str] = {}
        self._skipped: dict[str, list[str]] = {reason: [] for reason in KINDS}
        self._suffixes: Counter[str] = Counter()  # of files that are not images
        for entry in self._entries(root):
            folder = Path(entry.path)
            if entry.is_dir():
                self._read_class(folder)
            elif self._is_image(entry):
                self._skip(OUTSIDE, folder)

    def left_out(self) -> tuple[LeftOut, ...]:
        """Return what was left out, by reason."""
        skipped = self._skipped | {
            UNREADABLE: [f"{self._name(folder)} ({reason})" for folder, reason in self.unreadable.items()],
            OTHER: [
                f"{suffix} ({count})"
                for suffix, count in sorted(self._suffixes.items(), key=lambda s: (-s[1], s[0]))
            ],
        }
        counts = {reason: len(names) for reason, names in skipped.items()} | {OTHER: self._suffixes.total()}
        return tuple(
            LeftOut(reason, tuple(names), counts[reason]) for reason, names in skipped.items() if names
        )

    def _read_class(self, folder: Path) -> None:
        before = len(self.images), self._suffixes.copy(), len(self.unreadable)
        # The file system of macOS decomposes accents, so that a name may differ between the copies of two splits.
        self._read(folder, unicodedata.normalize("NFC", folder.name), {_identity(self.root)})
        if len(self.images) == before[0] and len(self.unreadable) == before[2]:
            others = self._suffixes - before[1]
            content = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(SHOWN))
            self._skipped[EMPTY].append(f"{folder.name} ({content or 'empty'})")

    def _read(self, folder: Path, name: str, visited: set[tuple[int, int]]) -> None:
        """Read a folder and its subfolders; `visited` holds the folders that are read for this class."""
        identity = _identity(folder)
        if identity in visited:
            self._skip(REPEATED, folder)
            return
        visited.add(identity)
        for entry in self._entries(folder):
            path = Path(entry.path)
            if entry.is_dir():
                self._read(path, name, visited)
            elif self._is_image(entry):
                self.images.append((path, name))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the visible entries of a folder by name. Links whose target cannot be examined count as unreadable."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable[folder] = error.strerror or str(error)
            return []
        visible = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                self._skip(HIDDEN, Path(entry.path))
                continue
            try:
                entry.is_dir()
                visible.append(entry)
            except OSError as error:
                self.unreadable[Path(entry.path)] = error.strerror or str(error)
        return visible

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Return whether an entry that is not a folder is an image; count it otherwise.

        A broken link with the suffix of an image counts as an image, which cannot be read.
        """
        path = Path(entry.path)
        is_broken = entry.is_symlink() and not path.exists()
        if not entry.is_file() and not is_broken:
            self._skip(SPECIAL, path)
        elif path.suffix.lower() in SUFFIXES:
            return True
        elif is_broken:
            self._skip(BROKEN, path)
        else:
            self._suffixes[path.suffix.lower() or "no suffix"] += 1
        return False

    def _skip(self, reason: str, path: Path) -> None:
        self._skipped[reason].append(self._name(path))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
