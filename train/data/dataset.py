"""The dataset record: samples, labels and class names of all splits, checked against one another."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

Splits = dict[str, tuple[Tensor, Tensor]]  # train, test and perhaps val -> samples and classes


@dataclass(frozen=True)
class Dataset:
    """Images [n, c, h, w] uint8, or features [n, d] float32, with their classes [n] int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: list[str]
    train_counts: Tensor  # [K]
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    notes: tuple[str, ...] = ()  # how the set came about, where that is not its file's matter

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_images(self) -> bool:
        return self.x_train.dim() == 4

    @property
    def sample_shape(self) -> list[int]:
        return list(self.x_train.shape[1:])

    @property
    def watched(self) -> tuple[str, Tensor, Tensor]:
        """What training is watched on: the validation split, or the test split where there is none; its name first."""
        if self.x_val is None or self.y_val is None:
            return "test", self.x_test, self.y_test
        return "validation", self.x_val, self.y_val

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Of the training images' channels, [c], in units of full brightness."""
        histogram = torch.zeros(self.sample_shape[0], 256, dtype=torch.float64)
        for part in self.x_train.split(1000):  # they may lie on a disk
            pixels = part.transpose(0, 1).flatten(1)  # [c, n·h·w] uint8
            histogram += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = histogram / histogram.sum(1, keepdim=True)
        mean = share @ levels
        std = (share @ levels.square() - mean.square()).clamp(min=1e-12).sqrt()
        return mean.float(), std.float()

    def fingerprint(self) -> str:
        """Changes when the data does: a run is not resumed on other data."""
        crc = 0
        validation = [] if self.x_val is None or self.y_val is None else [self.x_val, self.y_val]
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test, *validation):
            for part in tensor.split(10_000):
                crc = zlib.crc32(part.contiguous().numpy().data, crc)
        return f"{len(self.y_train)}+{len(self.y_test)} samples, {self.num_classes} classes, crc32 {crc:08x}"


def make_dataset(
    splits: Splits, names: np.ndarray | Tensor | list[str] | None, num_classes: int | None
) -> Dataset:
    """Check labels against one another: every class has training samples, the others' classes are among them.

    Raises:
        DataError: they are not as expected.
    """
    y_train = splits["train"][1]
    found = int(y_train.max()) + 1
    if num_classes is not None and found != num_classes:
        raise DataError(
            f"y_train: expected {num_classes} classes (--num-classes), got labels up to {found - 1}"
        )
    for split, (_, y) in splits.items():
        if int(y.max()) >= found:
            raise DataError(f"y_{split}: expected labels below {found} as in y_train, got {int(y.max())}")
    counts = torch.bincount(y_train, minlength=found)
    if absent := (counts == 0).nonzero().flatten().tolist():
        some = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
        raise DataError(f"y_train: expected a sample of every class up to {found - 1}, got none of {some}")
    if names is not None and len(names) != found:
        raise DataError(f"classes: expected {found} names to match y_train, got {len(names)}")
    class_names = [str(name) for name in (range(found) if names is None else names)]
    return Dataset(*splits["train"], *splits["test"], class_names, counts, *splits.get("val", ()))
