"""Rendering of characters as small grayscale images: white on black, centered.

This module does not import torch, so that worker processes start quickly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

MARGIN = 1  # empty pixels on each side
SUPERSAMPLING = 2  # images are rendered at this multiple of their size, then averaged


class Variation(NamedTuple):
    """A deformation of an image. With all values 0 the image is the plain one."""

    angle: float = 0.0  # radians
    shear: float = 0.0  # horizontal shift per unit of height
    stretch: float = 0.0  # log(width / height)
    shrink: float = 0.0  # log of the scale relative to the largest one that fits
    weight: float = 0.0  # stroke weight, from -1 (thinner) to 1 (bolder)


def render_ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Render a character in grayscale, cropped to its ink; return None if it has no ink."""
    left, top, right, bottom = font.getbbox(character)
    left, top, right, bottom = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, 255, font)
    box = image.getbbox()
    return image.crop(box) if box else None


def fit_to_square(image: Image.Image, size: int, variation: Variation) -> np.ndarray:
    """Deform the ink and center it in a square, as large as fits within the margin.

    Returns:
        The image, [size, size] uint8.
    """
    if variation.weight:
        blurred = image.filter(ImageFilter.GaussianBlur(0.8))
        image = blurred.point(
            [round(min(max(2 * v - 128 + 60 * variation.weight, 0), 255)) for v in range(256)]
        )
    cos, sin = math.cos(variation.angle), math.sin(variation.angle)
    wide, high = math.exp(variation.stretch / 2), math.exp(-variation.stretch / 2)
    forward = (
        np.array([[cos, -sin], [sin, cos]]) @ [[1.0, variation.shear], [0.0, 1.0]] @ np.diag([wide, high])
    )
    extent = np.abs(forward) @ image.size  # size of the bounding box after the map
    forward *= math.exp(variation.shrink) * SUPERSAMPLING * (size - 2 * MARGIN) / extent.max()
    inverse = np.linalg.inv(forward)  # PIL takes the map from output pixels to input pixels
    side = SUPERSAMPLING * size
    shift = np.array(image.size) / 2 - inverse @ [side / 2, side / 2]
    data = (inverse[0, 0], inverse[0, 1], shift[0], inverse[1, 0], inverse[1, 1], shift[1])
    placed = image.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(placed.reduce(SUPERSAMPLING))
