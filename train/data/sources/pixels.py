"""Pixels of every kind as 8-bit RGB. This module does not import torch, so that worker processes start quickly."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Formats whose gray images of more than 8 bits use the full range of 16 bits, by Pillow's mode.
FULL_RANGE = {"I;16": ("PNG", "TIFF", "JPEG2000", "PPM"), "I;16B": ("TIFF",), "I": ("PNG", "PPM")}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0


def read_rgb(image: Image.Image) -> Image.Image:
    """Load an image that was opened, and return its pixels as 8-bit RGB.

    - Gray values of 16 bits are divided by 257 and rounded; those of 12 bits are scaled likewise. Pillow itself reduces
      colors of 16 bits to their upper byte.
    - A transparent image is drawn on white.
    - Other integers and floating-point numbers are refused, because a file does not say which value is white.

    Raises:
        ValueError: the range of the pixels' values is unknown.
        Exception: any other error of the format's decoder.
    """
    raw_mode = _raw_mode(image)
    image.load()
    if image.mode in ("F", *FULL_RANGE):
        image = _from_wide_gray(image)
    elif "transparency" in image.info:
        _scale_transparent_color(image, raw_mode)
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return the kind of samples in the file, such as `L;4`, which Pillow forgets when it loads the image."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else ""


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """Return a gray image of more than 8 bits per pixel as one of 8 bits, with an alpha channel if it is transparent."""
    if image.format not in FULL_RANGE.get(image.mode, ()):
        kind = "floating-point numbers" if image.mode == "F" else "integers of more than 8 bits"
        raise ValueError(
            f"expected pixels of 8 bits, or gray of 16 bits in PNG, TIFF, JPEG 2000 or PGM, got {kind} in "
            f"{image.format}, whose range is unknown"
        )
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    values = np.asarray(image).astype(np.int64)
    gray = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        gray = gray.point(lambda value: 255 - value)
    if (transparent := image.info.get("transparency")) is None:
        return gray
    return Image.merge(
        "LA", (gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    )


def _scale_transparent_color(image: Image.Image, raw_mode: str) -> None:
    """Scale a PNG file's transparent color like its pixels; Pillow leaves it as it is in the file."""
    color = image.info["transparency"]
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)
