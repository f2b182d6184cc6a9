"""Image files, decoded once into memory-mapped uint8 arrays of one size, which later runs only open."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import mapping, whole_folder
from .listing import Listing
from .pictures import decode_into

BATCH = 64  # images a worker takes at a time


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
        images [n, 3, size, size] uint8 (memory-mapped); the rows that could not be read (black), and what was said
        of each.
    """
    folder = cache / f"{_key(listing, size)}-{size}"
    if not (folder / "done.json").is_file():
        _make(listing, size, folder, workers)
    unreadable = json.loads((folder / "done.json").read_text())["unreadable"]
    images = np.memmap(folder / "images.u8", np.uint8, "c", shape=(len(listing), size, size, 3))
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        [row for row, _ in unreadable],
        [why for _, why in unreadable],
    )


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
        (aside / "done.json").write_text(json.dumps({"unreadable": unreadable}))


def _key(listing: Listing, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    for file in listing.files:
        try:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{file}\0missing\n".encode())
    return digest.hexdigest()[:16]
