"""Augmentation of whole batches of images by numbers that are drawn with them, so that runs repeat and resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Shares of red, green and blue in brightness (ITU-R 601), as torchvision's and PIL's grey has them.
GREY = (0.299, 0.587, 0.114)

#: Random numbers that an image is augmented by, uniform in [0, 1): across, down, flip, area, ratio, three of jitter.
NUMBERS = 8
ACROSS, DOWN, FLIP, AREA, RATIO, JITTER = range(6)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a batch [b, c, h, w] uint8, in this order; nothing by default.

    crop_scale is the least share of the area that a random crop takes, of any aspect ratio from 3/4 to 4/3 (Szegedy et al.,
    CVPR 2015), resized to crop_size; crop_padding crops after padding with zeros; jitter is the largest change of
    brightness, contrast and saturation, in that order.
    """

    crop_padding: int = 0
    flip: bool = False
    crop_size: int = 0
    crop_scale: float | None = None
    jitter: float = 0.0

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """The batch, uint8 where pixels are only moved, otherwise float32 from 0 to 255; by `numbers` [b, NUMBERS].

        Everything is made on the images' device, where the numbers are too: a GPU waits for no copy, and a CUDA graph
        can hold it.
        """
        if images.dim() != 4:
            return images
        if self.crop_scale is not None:
            images = self._resized_crops(images, numbers, self.crop_scale)
        elif self.crop_padding or self.flip or 0 < self.crop_size < max(images.shape[2:]):
            images = self._shifts(images, numbers)
        return self._jittered(images, numbers) if self.jitter else images

    def _flips(self, numbers: Tensor) -> Tensor:
        """[b] bool."""
        return (numbers[:, FLIP] < 0.5) & self.flip

    def _shifts(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Crops after zero padding, and flips, in one gather."""
        (b, c, h, w), p = images.shape, self.crop_padding
        out_h, out_w = (min(self.crop_size, h), min(self.crop_size, w)) if self.crop_size else (h, w)
        top = (numbers[:, DOWN] * (h + 2 * p - out_h + 1)).long()
        left = (numbers[:, ACROSS] * (w + 2 * p - out_w + 1)).long()
        rows = top[:, None] + torch.arange(out_h, device=images.device)  # [b, h]
        columns = left[:, None] + torch.arange(out_w, device=images.device)  # [b, w]
        columns = torch.where(self._flips(numbers)[:, None], columns.flip(1), columns)
        sample = torch.arange(b, device=images.device)[:, None, None, None]
        channel = torch.arange(c, device=images.device)[:, None, None]
        padded = F.pad(images, (p, p, p, p))
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _resized_crops(self, images: Tensor, numbers: Tensor, least: float) -> Tensor:
        """One box an image, resized by bilinear sampling, and flips."""
        b, _, h, w = images.shape
        area = numbers[:, AREA] * (1 - least) + least
        ratio = ((2 * numbers[:, RATIO] - 1) * math.log(4 / 3)).exp()
        # Parts of the image's width and height; what would not fit is cut to the image.
        width = (area * ratio * h / w).sqrt().clamp(max=1.0)
        height = (area / ratio * w / h).sqrt().clamp(max=1.0)
        x = (2 * numbers[:, ACROSS] - 1) * (1 - width)  # the box's centre, -1 to 1
        y = (2 * numbers[:, DOWN] - 1) * (1 - height)
        sign = torch.where(self._flips(numbers), -1.0, 1.0)
        zero = torch.zeros_like(x)
        boxes = torch.stack([torch.stack([sign * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
        size = self.crop_size or min(h, w)
        grid = F.affine_grid(boxes, [b, images.shape[1], size, size], align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)

    def _jittered(self, images: Tensor, numbers: Tensor) -> Tensor:
        x = images.float()
        factors = 1 + self.jitter * (2 * numbers[:, JITTER:NUMBERS] - 1)
        brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
        x = (x * brightness).clamp(0, 255)
        x = torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True), x, contrast).clamp(0, 255)
        return torch.lerp(_grey(x), x, saturation).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    """[b, 1, h, w]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    grey: Tensor = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return grey
