"""Decoding of single image files. This module does not import torch, so that worker processes start quickly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode(file: Path, size: int) -> np.ndarray:
    """Decode an image, resize its shorter side to `size` and crop the center, [size, size, 3] uint8.

    Raises:
        OSError, ValueError, SyntaxError: the file is not an image, or is damaged.
    """
    with Image.open(file) as image:
        image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a reduced size
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))


def decoding_error(file: Path, size: int) -> str:
    """Return the error of decoding the file, or an empty string if there is none."""
    try:
        decode(file, size)
    except UNREADABLE as error:
        return f"{file}: {str(error) or type(error).__name__}"
    return ""


def decode_into(array: Path, total: int, size: int, start: int, files: list[Path]) -> list[tuple[int, str]]:
    """Decode files into the rows of an array from `start` on.

    Args:
        array: the file of the array [total, size, size, 3] uint8.
        total, size: its shape.
        start: the row of the first file.
        files: the image files.

    Returns:
        The row and the error of each file that cannot be decoded.
    """
    images = np.memmap(array, np.uint8, "r+", shape=(total, size, size, 3))
    errors = []
    for row, file in enumerate(files, start):
        try:
            images[row] = decode(file, size)
        except UNREADABLE as error:
            errors.append((row, f"{file}: {str(error) or type(error).__name__}"))
    images.flush()
    return errors
