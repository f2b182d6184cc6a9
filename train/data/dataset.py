"""The dataset record: samples, labels and class names of all splits, checked against one another."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..console import counted
from .classes import Labels, number_classes
from .errors import DataError

Splits = dict[str, tuple[Tensor, Labels]]  # "train", "test" and possibly "val" -> samples and labels


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
    class_labels: tuple[str, ...] = ()  # what the data call each class: a label, a name or an id

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
    splits: Splits,
    names: Sequence[object] | None,
    num_classes: int | None,
    class_labels: Sequence[object] | None = None,
) -> Dataset:
    """Make a dataset, with classes numbered as by `number_classes`.

    Args:
        splits: samples and labels. With names, labels are positions in `names`; otherwise any integers.
        names: the classes' names; their labels if None.
        num_classes: the expected number of classes; not checked if None.
        class_labels: what the data call each class; the labels if None.

    Raises:
        DataError: a label has no name, another split has classes without training samples, or the number of classes is
            not the expected one.
    """
    numbering = number_classes({split: y for split, (_, y) in splits.items()}, names, class_labels)
    found = len(numbering.names)
    if num_classes is not None and found != num_classes:
        raise DataError(
            f"y_train: expected {counted(num_classes, 'class', 'classes')} (--num-classes), got {found}"
        )
    x, y = {split: x for split, (x, _) in splits.items()}, numbering.labels
    return Dataset(
        x["train"],
        y["train"],
        x["test"],
        y["test"],
        numbering.names,
        torch.bincount(y["train"], minlength=found),
        x.get("val"),
        y.get("val"),
        tuple(numbering.notes),
        tuple(numbering.sources),
    )


def read_only_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor that shares the array's memory and must not be written to.

    A read-only memory map stays read-only: a write ends the process. A writable map would count as memory in use.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
