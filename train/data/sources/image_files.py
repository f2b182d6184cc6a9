"""Image files to arrays. Without torch, so that the processes that do it start at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode(file: Path, size: int) -> np.ndarray:
    """The image, its shorter side resized to `size` and the middle cut out, [size, size, 3] uint8.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, or a broken one.
    """
    with Image.open(file) as image:
        image.draft("RGB", (2 * size, 2 * size))  # of a JPEG, decodes no more than that needs
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))


def why_unreadable(file: Path, size: int) -> str:
    """What is wrong with the file; empty if nothing is."""
    try:
        decode(file, size)
    except UNREADABLE as error:
        return f"{file}: {str(error) or type(error).__name__}"
    return ""


def decode_into(array: Path, total: int, size: int, start: int, files: list[Path]) -> list[tuple[int, str]]:
    """Fill rows from `start` on; returns those that could not be read, and why."""
    images = np.memmap(array, np.uint8, "r+", shape=(total, size, size, 3))
    unreadable = []
    for row, file in enumerate(files, start):
        try:
            images[row] = decode(file, size)
        except UNREADABLE as error:
            unreadable.append((row, f"{file}: {str(error) or type(error).__name__}"))
    images.flush()
    return unreadable
