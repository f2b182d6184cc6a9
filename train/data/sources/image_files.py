"""Decoding of single image files. This module does not import torch, so that worker processes start quickly."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import DataError
from .pixels import read_rgb

Image.preinit()  # the usual formats are tried first
Image.init()
#: Formats that are not opened: PostScript, which Pillow passes to another program, and containers that it cannot decode.
EXCLUDED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
FORMATS = tuple(name for name in Image.ID if name not in EXCLUDED)
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
)
#: EXIF's orientation -> the operation that turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(DataError):
    """A file that cannot be decoded. The message names the file and the reason."""


def decode(file: Path, size: int) -> np.ndarray:
    """Decode an image, resize its shorter side to `size` and crop the center, [size, size, 3] uint8.

    Decoders of damaged files raise errors of any kind, and all of them mean that the file is unreadable. Warnings are
    ignored: the pixels do not depend on the filters of warnings. Images over twice Pillow's `MAX_IMAGE_PIXELS` (179
    million pixels) are refused.

    Raises:
        UnreadableImage: the file is not an image, is damaged or too large, or has pixels of an unknown range.
        DataError: the memory does not suffice, which may not be the file's fault.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(file, size)
    except MemoryError:
        raise DataError(f"{file}: expected memory to decode the image, got none") from None
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        known = isinstance(error, (OSError, ValueError, SyntaxError)) and words
        raise UnreadableImage(
            f"{file}: {words if known else f'{type(error).__name__} {words}'.strip()}"
        ) from None


def _decode(file: Path, size: int) -> np.ndarray:
    with Image.open(file, formats=FORMATS) as image:
        return prepare(image, size)


def prepare(image: Image.Image, size: int) -> np.ndarray:
    """Return an image as the driver trains on it: upright, RGB, resized and center-cropped, [size, size, 3] uint8."""
    image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at a reduced size
    upright = read_rgb(image)
    if (operation := UPRIGHT.get(_orientation(image))) is not None:
        upright = upright.transpose(operation)
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation; 1, which is upright, if the metadata is absent or damaged and the pixels are not."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def decoding_error(file: Path, size: int) -> str:
    """Return the error of decoding the file, or an empty string if there is none."""
    try:
        decode(file, size)
    except UnreadableImage as error:
        return str(error)
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
        except UnreadableImage as error:
            errors.append((row, str(error)))
    images.flush()
    return errors
