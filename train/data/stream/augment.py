"""Augmentation of batches of images by given random numbers, so that runs repeat and resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .auto_augment import AutoAugment, image_seeds

#: Weights of red, green and blue in the luminance (ITU-R 601), as in torchvision and PIL.
LUMINANCE = (0.299, 0.587, 0.114)

#: The random numbers of an image, uniform in [0, 1), by column. The last three columns are the color jitter's, and
#: the last two make the seed of an `AutoAugment`.
NUM_UNIFORMS = 8
CROP_X, CROP_Y, FLIP, AREA, RATIO, JITTER = range(6)


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a batch of images [b, c, h, w] uint8. By default images are left unchanged.

    Attributes:
        crop_padding: random crops are taken after zero-padding by this many pixels on each side.
        flip: half of the images are flipped horizontally.
        crop_size: side of the crops; 0 for the whole image.
        crop_scale: random crops take at least this share of the area, at an aspect ratio from 3/4 to 4/3, and are resized
            to crop_size (Szegedy et al., CVPR 2015). Replaces crop_padding.
        policy: changes the images after crops and flips; see `AutoAugment`.
        jitter: brightness, contrast and saturation change, in this order, by up to this share.
    """

    crop_padding: int = 0
    flip: bool = False
    crop_size: int = 0
    crop_scale: float | None = None
    jitter: float = 0.0
    policy: AutoAugment | None = None

    def __call__(self, images: Tensor, uniforms: Tensor, seeds: list[int] | None = None) -> Tensor:
        """Augment the images by random numbers [b, NUM_UNIFORMS].

        All work is done on the images' device, where the random numbers are too. The host does not wait, and a CUDA graph
        can capture the work, unless there is a policy.

        Args:
            images: [b, c, h, w] uint8, or features.
            uniforms: the random numbers.
            seeds: from `seeds`, for a policy.

        Returns:
            uint8 images if pixels are only moved, otherwise float32 images from 0 to 255. Features are returned as they are.
        """
        if images.dim() != 4:
            return images
        if self.crop_scale is not None:
            images = self._resized_crop(images, uniforms, self.crop_scale)
        elif self.crop_padding or self.flip or 0 < self.crop_size < max(images.shape[2:]):
            images = self._crop(images, uniforms)
        if self.policy is not None and seeds is not None:
            images = self.policy(images, seeds)
        return self._color_jitter(images, uniforms) if self.jitter else images

    def seeds(self, uniforms: Tensor) -> list[int] | None:
        """Return the seeds of the images for the policy, from their random numbers on the CPU; None without a policy."""
        return None if self.policy is None else image_seeds(uniforms[:, -2:])

    def _flipped(self, uniforms: Tensor) -> Tensor:
        """Return the mask of the images to flip, [b] bool."""
        return (uniforms[:, FLIP] < 0.5) & self.flip

    def _crop(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Crop after zero-padding, and flip, in one gather."""
        (b, c, h, w), p = images.shape, self.crop_padding
        out_h, out_w = (min(self.crop_size, h), min(self.crop_size, w)) if self.crop_size else (h, w)
        top = (uniforms[:, CROP_Y] * (h + 2 * p - out_h + 1)).long()
        left = (uniforms[:, CROP_X] * (w + 2 * p - out_w + 1)).long()
        rows = top[:, None] + torch.arange(out_h, device=images.device)  # [b, out_h]
        columns = left[:, None] + torch.arange(out_w, device=images.device)  # [b, out_w]
        columns = torch.where(self._flipped(uniforms)[:, None], columns.flip(1), columns)
        sample = torch.arange(b, device=images.device)[:, None, None, None]
        channel = torch.arange(c, device=images.device)[:, None, None]
        padded = F.pad(images, (p, p, p, p))
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _resized_crop(self, images: Tensor, uniforms: Tensor, min_area: float) -> Tensor:
        """Crop a box from each image, resize the box by bilinear sampling, and flip."""
        b, _, h, w = images.shape
        area = uniforms[:, AREA] * (1 - min_area) + min_area
        ratio = ((2 * uniforms[:, RATIO] - 1) * math.log(4 / 3)).exp()
        # The box's width and height as shares of the image's. A box that does not fit is cut to the image.
        width = (area * ratio * h / w).sqrt().clamp(max=1.0)
        height = (area / ratio * w / h).sqrt().clamp(max=1.0)
        x = (2 * uniforms[:, CROP_X] - 1) * (1 - width)  # the box's center, -1 to 1
        y = (2 * uniforms[:, CROP_Y] - 1) * (1 - height)
        sign = torch.where(self._flipped(uniforms), -1.0, 1.0)
        zero = torch.zeros_like(x)
        boxes = torch.stack([torch.stack([sign * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
        size = self.crop_size or min(h, w)
        grid = F.affine_grid(boxes, [b, images.shape[1], size, size], align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)

    def _color_jitter(self, images: Tensor, uniforms: Tensor) -> Tensor:
        x = images.float()
        factors = 1 + self.jitter * (2 * uniforms[:, JITTER:NUM_UNIFORMS] - 1)
        brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
        x = (x * brightness).clamp(0, 255)
        x = torch.lerp(_luminance(x).mean((1, 2, 3), keepdim=True), x, contrast).clamp(0, 255)
        return torch.lerp(_luminance(x), x, saturation).clamp(0, 255)


def _luminance(images: Tensor) -> Tensor:
    """Return gray images, [b, 1, h, w]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    gray: Tensor = LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue
    return gray
