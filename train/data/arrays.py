"""Data sets from files of arrays: read once, checked once, kept in memory as tensors."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from .errors import DataError

EMBEDDED = {"fashion-mnist-lt": Path(__file__).parent / "fashion_mnist_lt" / "fashion_mnist_lt100.npz"}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images [n, c, h, w] uint8, or features [n, d] float32, with their classes [n] int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: list[str]
    train_counts: Tensor  # [K]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_images(self) -> bool:
        return self.x_train.dim() == 4

    @property
    def sample_shape(self) -> list[int]:
        return list(self.x_train.shape[1:])

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
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            for part in tensor.split(10_000):
                crc = zlib.crc32(part.contiguous().numpy().data, crc)
        return f"{len(self.y_train)}+{len(self.y_test)} samples, {self.num_classes} classes, crc32 {crc:08x}"


def load_arrays(source: str, num_classes: int | None = None) -> Dataset:
    """Read a `.npz` or `.safetensors` file, or a set that comes with the package, and check every array in it.

    Args:
        source: a path, or a name in `EMBEDDED`.
        num_classes: the classes there must be; the largest label of the training set says it if None.

    Raises:
        DataError: the file or an array in it is not as expected.
    """
    path = EMBEDDED.get(source, Path(source))
    return from_arrays(path, _read(path), num_classes)


def from_arrays(
    path: Path, arrays: Mapping[str, np.ndarray | Tensor], num_classes: int | None = None
) -> Dataset:
    """Check arrays that were read from `path`. Raises as `load_arrays`."""
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise DataError(f"{path}: expected the arrays {', '.join(ARRAYS)}, got {', '.join(arrays) or 'none'}")
    names = arrays.get("classes")
    try:
        x_train, x_test = (_samples(name, arrays[name]) for name in ("x_train", "x_test"))
        y_train, y_test = (_labels(name, arrays[name]) for name in ("y_train", "y_test"))
        _check_fit(x_train, y_train, x_test, y_test)
        return make_dataset(x_train, y_train, x_test, y_test, names, num_classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, np.ndarray | Tensor]:
    if path.suffix not in (".npz", ".safetensors"):
        raise DataError(
            f"{path}: expected a file named .npz or .safetensors, or one of {', '.join(EMBEDDED)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        return _read_safetensors(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: expected a readable {path.suffix} file, got {error}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray | Tensor]:
    """The format has no strings in tensors: names of classes are a JSON list in its metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        arrays: dict[str, np.ndarray | Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = (file.metadata() or {}).get("classes")
    if names is not None:
        arrays["classes"] = np.array(json.loads(names), ndmin=1)
    return arrays


def _say(array: np.ndarray | Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _samples(name: str, array: np.ndarray | Tensor) -> Tensor:
    got = _say(array)
    if array.ndim == 2 and got.startswith(("float", "bfloat")):
        features = torch.as_tensor(array).float()
        if not features.isfinite().all():
            raise DataError(
                f"{name}: expected finite features, got {int((~features.isfinite()).sum())} that are not"
            )
        return features
    if got.startswith("uint8") and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))):
        images = torch.as_tensor(array)
        images = images.unsqueeze(3) if images.dim() == 3 else images
        return images.permute(0, 3, 1, 2).contiguous()
    shapes = "uint8 images [n, h, w], [n, h, w, 1] or [n, h, w, 3], or floating-point features [n, d]"
    raise DataError(f"{name}: expected {shapes}, got {got}")


def _labels(name: str, array: np.ndarray | Tensor) -> Tensor:
    got = _say(array)
    if array.ndim != 1 or not got.startswith(("int", "uint")):
        raise DataError(f"{name}: expected integer labels [n], got {got}")
    labels = torch.as_tensor(array.astype(np.int64) if isinstance(array, np.ndarray) else array.long())
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"{name}: expected labels from 0 on, got {int(labels.min())}")
    return labels


def _check_fit(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) == 0:
            raise DataError(f"x_{part}: expected some samples, got none")
        if len(x) != len(y):
            raise DataError(f"y_{part}: expected {len(x)} labels to match x_{part}, got {len(y)}")
    if x_train.shape[1:] != x_test.shape[1:]:
        got = f"{list(x_test.shape[1:])}, not {list(x_train.shape[1:])}"
        raise DataError(f"x_test: expected samples of the same shape as x_train's, got {got}")


def make_dataset(
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    names: np.ndarray | Tensor | list[str] | None,
    num_classes: int | None,
) -> Dataset:
    """Check labels against one another: every class has training samples, the test's classes are among them.

    Raises:
        DataError: they are not as expected.
    """
    found = int(y_train.max()) + 1
    if num_classes is not None and found != num_classes:
        raise DataError(
            f"y_train: expected {num_classes} classes (--num-classes), got labels up to {found - 1}"
        )
    if int(y_test.max()) >= found:
        raise DataError(f"y_test: expected labels below {found} as in y_train, got {int(y_test.max())}")
    counts = torch.bincount(y_train, minlength=found)
    if absent := (counts == 0).nonzero().flatten().tolist():
        some = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
        raise DataError(f"y_train: expected a sample of every class up to {found - 1}, got none of {some}")
    if names is not None and len(names) != found:
        raise DataError(f"classes: expected {found} names to match y_train, got {len(names)}")
    class_names = [str(name) for name in (range(found) if names is None else names)]
    return Dataset(x_train, y_train, x_test, y_test, class_names, counts)
