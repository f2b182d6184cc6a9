"""The dataset record: samples, labels and class names of all splits, checked against one another."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

Splits = dict[str, tuple[Tensor, Tensor]]  # "train", "test" and possibly "val" -> samples and labels


@dataclass(frozen=True)
class Dataset:
    """Images [n, c, h, w] uint8 or features [n, d] float32, with labels [n] int64, of each split."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: list[str]
    train_counts: Tensor  # [K]
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    notes: tuple[str, ...] = ()  # how the dataset was made and what was left out

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
    def eval_split(self) -> tuple[str, Tensor, Tensor]:
        """The name, samples and labels of the split that epochs are evaluated on: validation, or test without one."""
        if self.x_val is None or self.y_val is None:
            return "test", self.x_test, self.y_test
        return "validation", self.x_val, self.y_val

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each channel of the training images, [c], for pixels from 0 to 1."""
        histogram = torch.zeros(self.sample_shape[0], 256, dtype=torch.float64)
        for chunk in self.x_train.split(1000):  # the images may be memory-mapped
            pixels = chunk.transpose(0, 1).flatten(1)  # [c, n·h·w] uint8
            histogram += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = histogram / histogram.sum(1, keepdim=True)
        mean = share @ levels
        std = (share @ levels.square() - mean.square()).clamp(min=1e-12).sqrt()
        return mean.float(), std.float()

    def fingerprint(self) -> str:
        """Return a checksum of all samples and labels. A run is resumed only if the checksum is unchanged."""
        crc = 0
        validation = [] if self.x_val is None or self.y_val is None else [self.x_val, self.y_val]
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test, *validation):
            for chunk in tensor.split(10_000):
                crc = zlib.crc32(chunk.contiguous().numpy().data, crc)
        return f"{len(self.y_train)}+{len(self.y_test)} samples, {self.num_classes} classes, crc32 {crc:08x}"


def make_dataset(
    splits: Splits, names: np.ndarray | Tensor | list[str] | None, num_classes: int | None
) -> Dataset:
    """Make a dataset and check its labels.

    Args:
        splits: samples and labels.
        names: the classes' names; their numbers if None.
        num_classes: the expected number of classes; not checked if None.

    Raises:
        DataError: a class has no training sample, another split has other classes, or the number of classes or names
            is not the expected one.
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
        listed = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
        raise DataError(
            f"y_train: expected at least one sample of each class from 0 to {found - 1}, got none of {listed}"
        )
    if names is not None and len(names) != found:
        raise DataError(f"classes: expected {found} names to match y_train, got {len(names)}")
    # A name may have bytes that are no text, which no file could be written with.
    class_names = [
        str(name).encode("utf-8", "backslashreplace").decode()
        for name in (range(found) if names is None else names)
    ]
    return Dataset(*splits["train"], *splits["test"], class_names, counts, *splits.get("val", ()))


def read_only_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor that shares the array's memory and must not be written to.

    A read-only memory map stays read-only: a write ends the process. A writable map would count as memory in use.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
