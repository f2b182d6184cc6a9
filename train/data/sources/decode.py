"""Image files, decoded once into memory-mapped uint8 arrays of one size, which later runs only open."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor

from ..cache import mapping, shared, whole_folder
from .image_files import decode_into, why_unreadable
from .listing import Listing

BATCH = 64  # images a worker takes at a time
RETRIED = 20  # of the files that could not be read, those that are tried again before that is believed


def load_images(
    listing: Listing, size: int, cache: Path, workers: int | None = None
) -> tuple[Tensor, list[int], list[str]]:
    """All images of a list.

    Args:
        listing: the files.
        size: side of the squares that they become.
        cache: where decoded arrays are kept. A file that is there is used if files' names, sizes and times are those of
            the list; a run that is stopped leaves nothing that another would take for whole.
        workers: processes; as many as there are processors if None.

    Returns:
        images [n, 3, size, size] uint8, memory-mapped, not to be written to; their places in the list; and what was said
        of each file that could not be read, which has no image.
    """
    folder = cache / f"{_key(listing, size)}-{size}"
    if not (folder / "done.json").is_file():
        _make(listing, size, folder, workers)
    elif any(not why_unreadable(listing.files[row], size) for row, _ in _unreadable(folder)[:RETRIED]):
        _make(listing, size, folder, workers)  # the trouble was the disk's, and is over
    unreadable = _unreadable(folder)
    left_out = {row for row, _ in unreadable}
    rows = [row for row in range(len(listing)) if row not in left_out]
    if rows:
        images = np.memmap(folder / "images.u8", np.uint8, "r", shape=(len(rows), size, size, 3))
    else:
        images = np.empty((0, size, size, 3), np.uint8)  # type: ignore[assignment]  # a file of nothing has no mapping
    return shared(images).permute(0, 3, 1, 2), rows, [why for _, why in unreadable]


def _unreadable(folder: Path) -> list[tuple[int, str]]:
    return [(row, why) for row, why in json.loads((folder / "done.json").read_text())["unreadable"]]


def _make(listing: Listing, size: int, folder: Path, workers: int | None) -> None:
    total = len(listing)
    needed = total * size * size * 3
    with whole_folder(folder, needed) as aside, mapping(total <= BATCH, workers) as each:
        with open(aside / "images.u8", "wb") as file:
            file.truncate(needed)
        starts = range(0, total, BATCH)
        parts = [listing.files[start : start + BATCH] for start in starts]
        decode = functools.partial(decode_into, aside / "images.u8", total, size)
        unreadable = [pair for some in each(decode, starts, parts) for pair in some]
        if unreadable:
            _close_up(aside / "images.u8", total, size, {row for row, _ in unreadable})
        (aside / "done.json").write_text(json.dumps({"unreadable": unreadable}))


def _close_up(array: Path, total: int, size: int, left_out: set[int]) -> None:
    """Take rows out of the file, so that nobody needs to copy what is left."""
    images = np.memmap(array, np.uint8, "r+", shape=(total, size, size, 3))
    place = 0
    for row in range(total):
        if row in left_out:
            continue
        if row != place:
            images[place] = images[row]
        place += 1
    images.flush()
    del images
    with open(array, "rb+") as file:
        file.truncate(place * size * size * 3)


def _key(listing: Listing, size: int) -> str:
    digest = hashlib.sha256(f"2 {size}".encode())  # 2: without rows for files that cannot be read
    for file in listing.files:
        try:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{file}\0missing\n".encode())
    return digest.hexdigest()[:16]
