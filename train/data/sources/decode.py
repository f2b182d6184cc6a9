"""Lists of image files as arrays: decoded once into the cache, memory-mapped by later runs."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor

from ..cache import atomic_folder, folder_lock, reserve
from ..dataset import read_only_tensor
from ..processes import process_map
from .image_files import decode_into, decoding_error
from .listing import Listing

ARRAY = "images.u8"
VERSION = 3  # version of the decoded pixels; a change makes cached images obsolete
BATCH = 64  # images per task of a worker process
RETRIES = 20  # at most this many unreadable files are tried again when the cache is opened


def load_images(
    listing: Listing, size: int, cache: Path, workers: int | None = None
) -> tuple[Tensor, list[int], list[str]]:
    """Load all images of a list, and decode them first if they are not in the cache.

    Args:
        listing: the files.
        size: side of the square images.
        cache: the folder of decoded arrays. An array is reused if the files' names, sizes and times are unchanged. A run
            that is stopped leaves no incomplete array there.
        workers: number of processes; one per processor if None.

    Returns:
        images [n, 3, size, size] uint8, memory-mapped and read-only; their rows in the list; and the error of each file
        that cannot be decoded, which has no image.
    """
    folder = cache / f"{_cache_key(listing, size)}-{size}"
    with folder_lock(folder):
        errors = _read_errors(folder, len(listing), size)
        # Errors may have been temporary, as of a network drive.
        if errors is None or any(not decoding_error(listing.files[row], size) for row, _ in errors[:RETRIES]):
            errors = _decode_all(listing, size, folder, workers)
        left_out = {row for row, _ in errors}
        rows = [row for row in range(len(listing)) if row not in left_out]
        if rows:
            images = np.memmap(folder / ARRAY, np.uint8, "r", shape=(len(rows), size, size, 3))
        else:
            images = np.empty((0, size, size, 3), np.uint8)  # type: ignore[assignment]  # an empty file cannot be mapped
    return read_only_tensor(images).permute(0, 3, 1, 2), rows, [error for _, error in errors]


def _read_errors(folder: Path, total: int, size: int) -> list[tuple[int, str]] | None:
    """Return the rows and errors of unreadable files; None if the folder is absent or damaged."""
    try:
        content = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        errors = [(row, error) for row, error in content["unreadable"]]
        is_whole = (folder / ARRAY).stat().st_size == (total - len(errors)) * size * size * 3
    except (OSError, ValueError):
        return None
    return errors if is_whole else None


def _decode_all(listing: Listing, size: int, folder: Path, workers: int | None) -> list[tuple[int, str]]:
    """Decode all files into the folder; return the rows and errors of the unreadable ones."""
    total = len(listing)
    needed = total * size * size * 3
    with (
        atomic_folder(folder, needed) as temporary,
        process_map(workers, serial=total <= BATCH) as each,
    ):
        array = temporary / ARRAY
        reserve(array, needed)
        starts = range(0, total, BATCH)
        batches = [listing.files[start : start + BATCH] for start in starts]
        results = each(functools.partial(decode_into, array, total, size), starts, batches)
        errors = [pair for batch_errors in results for pair in batch_errors]
        if errors:
            _remove_rows(array, total, size, {row for row, _ in errors})
        (temporary / "done.json").write_text(json.dumps({"unreadable": errors}), encoding="utf-8")
    return errors


def _remove_rows(array: Path, total: int, size: int, left_out: set[int]) -> None:
    """Remove rows from the file in-place, so that readers can map the file as it is."""
    images = np.memmap(array, np.uint8, "r+", shape=(total, size, size, 3))
    kept = 0
    for row in range(total):
        if row in left_out:
            continue
        if row != kept:
            images[kept] = images[row]
        kept += 1
    images.flush()
    del images
    with open(array, "rb+") as file:
        file.truncate(kept * size * size * 3)


def _cache_key(listing: Listing, size: int) -> str:
    """Return a key of the files' paths, sizes and times.

    The time of the last change of the inode is part of the key, because programs such as `cp -p`, `tar` and `rsync` restore
    the time of the content. The number of the inode is not, because some network drives give a file another one per mount.
    """
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    for file in listing.files:
        digest.update(str(file).encode("utf-8", "surrogatepass"))  # a name may be any bytes
        try:
            status = file.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode())
        except (OSError, ValueError):
            digest.update(b"\0missing\n")
    return digest.hexdigest()[:16]
