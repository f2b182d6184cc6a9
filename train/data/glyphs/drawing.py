"""Characters as small pictures: white on black, the ink's box in the middle. Without torch, as pictures.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

MARGIN = 1  # pixels without ink on each side
FINER = 2  # drawn so many times larger, then averaged


class Variation(NamedTuple):
    """How a picture departs from the plain one; each 0 for not at all."""

    angle: float = 0.0  # radians
    shear: float = 0.0  # of x by y
    stretch: float = 0.0  # log of width over height
    shrink: float = 0.0  # log of how much smaller than what fits
    weight: float = 0.0  # -1 to 1, thinner to bolder strokes


def ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The character cut out at its ink, greyscale; None if there is none."""
    left, top, right, bottom = font.getbbox(character)
    left, top, right, bottom = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, 255, font)
    box = image.getbbox()
    return image.crop(box) if box else None


def fit(image: Image.Image, size: int, variation: Variation) -> np.ndarray:
    """The ink at the centre of a square, as large as fits within its margin, [size, size] uint8."""
    if variation.weight:
        blurred = image.filter(ImageFilter.GaussianBlur(0.8))
        image = blurred.point(
            [round(min(max(2 * v - 128 + 60 * variation.weight, 0), 255)) for v in range(256)]
        )
    cos, sin = math.cos(variation.angle), math.sin(variation.angle)
    wide, high = math.exp(variation.stretch / 2), math.exp(-variation.stretch / 2)
    move = np.array([[cos, -sin], [sin, cos]]) @ [[1.0, variation.shear], [0.0, 1.0]] @ np.diag([wide, high])
    extent = np.abs(move) @ image.size  # of the box after the move
    move *= math.exp(variation.shrink) * FINER * (size - 2 * MARGIN) / extent.max()
    back = np.linalg.inv(move)  # PIL asks where a pixel comes from
    side = FINER * size
    shift = np.array(image.size) / 2 - back @ [side / 2, side / 2]
    data = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    placed = image.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(placed.reduce(FINER))
