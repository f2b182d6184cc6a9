"""Datasets from `.npz` and `.safetensors` files: reads the arrays and checks each one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from ..dataset import Dataset, Splits, make_dataset
from ..errors import DataError

EMBEDDED = {"fashion-mnist-lt": Path(__file__).parents[1] / "fashion_mnist_lt" / "fashion_mnist_lt100.npz"}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
VALIDATION = ("x_val", "y_val")  # optional


def load_arrays(source: str, num_classes: int | None = None) -> Dataset:
    """Read a `.npz` or `.safetensors` file, or a dataset that comes with the package, and check all its arrays.

    Args:
        source: a path, or a name in `EMBEDDED`.
        num_classes: the expected number of classes; not checked if None.

    Raises:
        DataError: the file or an array in it is invalid.
    """
    path = EMBEDDED.get(source, Path(source))
    return from_arrays(path, _read(path), num_classes)


def from_arrays(
    path: Path, arrays: Mapping[str, np.ndarray | Tensor], num_classes: int | None = None
) -> Dataset:
    """Make a dataset of arrays that were read from `path`. The arrays and errors are as for `load_arrays`."""
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise DataError(f"{path}: expected the arrays {', '.join(ARRAYS)}, got {', '.join(arrays) or 'none'}")
    names = arrays.get("classes")
    splits = ("train", "test", "val") if any(name in arrays for name in VALIDATION) else ("train", "test")
    missing = [f"{kind}_{split}" for split in splits for kind in "xy" if f"{kind}_{split}" not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected {missing[0]} in addition to {VALIDATION[missing[0] == 'x_val']}, got none"
        )
    try:
        checked = {
            split: (
                _samples(f"x_{split}", arrays[f"x_{split}"]),
                _labels(f"y_{split}", arrays[f"y_{split}"]),
            )
            for split in splits
        }
        _check_shapes(checked)
        return make_dataset(checked, names, num_classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, np.ndarray | Tensor]:
    if path.suffix not in (".npz", ".safetensors"):
        raise DataError(
            f"{path}: expected a file named .npz or .safetensors, or one of {', '.join(EMBEDDED)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: expected an existing file, got none")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        return _read_safetensors(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: expected a readable {path.suffix} file, got {error}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray | Tensor]:
    """Read the tensors, and the class names: a JSON list in the metadata, as the format has no tensors of strings."""
    with safetensors.safe_open(path, framework="pt") as file:
        arrays: dict[str, np.ndarray | Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = (file.metadata() or {}).get("classes")
    if names is not None:
        arrays["classes"] = np.array(json.loads(names), ndmin=1)
    return arrays


def _describe(array: np.ndarray | Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _samples(name: str, array: np.ndarray | Tensor) -> Tensor:
    got = _describe(array)
    if array.ndim == 2 and got.startswith(("float", "bfloat")):
        features = torch.as_tensor(array).float()
        if not features.isfinite().all():
            raise DataError(
                f"{name}: expected finite features, got {int((~features.isfinite()).sum())} values that are not finite"
            )
        return features
    if got.startswith("uint8") and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))):
        images = torch.as_tensor(array)
        images = images.unsqueeze(3) if images.dim() == 3 else images
        return images.permute(0, 3, 1, 2).contiguous()
    shapes = "uint8 images [n, h, w], [n, h, w, 1] or [n, h, w, 3], or floating-point features [n, d]"
    raise DataError(f"{name}: expected {shapes}, got {got}")


def _labels(name: str, array: np.ndarray | Tensor) -> Tensor:
    got = _describe(array)
    if array.ndim != 1 or not got.startswith(("int", "uint")):
        raise DataError(f"{name}: expected integer labels [n], got {got}")
    labels = torch.as_tensor(array.astype(np.int64) if isinstance(array, np.ndarray) else array.long())
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"{name}: expected labels of at least 0, got {int(labels.min())}")
    return labels


def _check_shapes(splits: Splits) -> None:
    shape = list(splits["train"][0].shape[1:])
    for split, (x, y) in splits.items():
        if len(x) == 0:
            raise DataError(f"x_{split}: expected at least one sample, got none")
        if len(x) != len(y):
            raise DataError(f"y_{split}: expected {len(x)} labels to match x_{split}, got {len(y)}")
        if list(x.shape[1:]) != shape:
            got = list(x.shape[1:])
            raise DataError(f"x_{split}: expected samples of x_train's shape {shape}, got {got}")
