"""Datasets from `.npz` and `.safetensors` files: reads the arrays and checks each one."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from ...console import counted
from ..classes import Labels
from ..dataset import Dataset, Splits, make_dataset
from ..errors import DataError

EMBEDDED = {"fashion-mnist-lt": Path(__file__).parents[1] / "fashion_mnist_lt" / "fashion_mnist_lt100.npz"}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
VALIDATION = ("x_val", "y_val")  # optional
PAIR = ("x", "y")  # samples without a division into splits, which are evaluated but not trained on
KNOWN = {*ARRAYS, *VALIDATION, "classes"}
#: Errors that damaged files raise in zipfile, zlib and numpy.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def load_arrays(source: str, num_classes: int | None = None) -> Dataset:
    """Read a `.npz` or `.safetensors` file, or a dataset that comes with the package, and check all its arrays.

    Args:
        source: a path, or a name in `EMBEDDED`.
        num_classes: the expected number of classes; not checked if None.

    Raises:
        DataError: the file or an array in it is invalid.
    """
    path = EMBEDDED.get(source, Path(source))
    return from_arrays(path, read_arrays(path), num_classes)


def from_arrays(
    path: Path, arrays: Mapping[str, np.ndarray | Tensor], num_classes: int | None = None
) -> Dataset:
    """Make a dataset of arrays that were read from `path`. The arrays and errors are as for `load_arrays`."""
    _check_present(path, arrays)
    splits = ("train", "test", "val") if any(name in arrays for name in VALIDATION) else ("train", "test")
    missing = [f"{kind}_{split}" for split in splits for kind in "xy" if f"{kind}_{split}" not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected {missing[0]} in addition to {VALIDATION[missing[0] == 'x_val']}, got none"
        )
    try:
        checked: Splits = {
            split: (
                _samples(f"x_{split}", arrays[f"x_{split}"]),
                _labels(f"y_{split}", arrays[f"y_{split}"]),
            )
            for split in splits
        }
        _check_shapes(checked)
        names = _names(arrays["classes"]) if "classes" in arrays else None
        return make_dataset(checked, names, num_classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def pair_of(path: Path, arrays: Mapping[str, np.ndarray | Tensor]) -> tuple[Tensor, Labels, list[str] | None]:
    """Return the samples, the labels and the names of the classes, if there are any, of arrays x and y read from `path`.

    Raises:
        DataError: an array is invalid.
    """
    try:
        x, y = _samples("x", arrays["x"]), _labels("y", arrays["y"])
        _check_lengths("", x, y)
        return x, y, _names(arrays["classes"]) if "classes" in arrays else None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def unlabeled(path: Path) -> tuple[str, Tensor]:
    """Return the samples of a file without labels, array x, or the test samples of a dataset; and the array's name.

    Raises:
        DataError: the file cannot be read, or has no such array.
    """
    arrays = read_arrays(path, ("x",))
    name = "x" if "x" in arrays else "x_test"
    try:
        return name, _samples(name, arrays[name])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _check_present(path: Path, names: Iterable[str], other: tuple[str, ...] = ()) -> None:
    """Refuse a file without the arrays of a dataset, or with neither these nor `other`."""
    names = list(names)
    choices = [expected for expected in (other, ARRAYS) if expected]
    if not any(set(expected) <= set(names) for expected in choices):
        expected = ", or ".join(map(", ".join, choices))
        raise DataError(f"{path}: expected the arrays {expected}, got {', '.join(names) or 'none'}")


def read_arrays(path: Path, other: tuple[str, ...] = ()) -> dict[str, np.ndarray | Tensor]:
    """Read the arrays of a dataset or, from a file without training samples, `other` arrays.

    Raises:
        DataError: the file cannot be read, or has neither.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise DataError(
            f"{path}: expected a file named .npz or .safetensors, or one of {', '.join(EMBEDDED)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: expected an existing file, got none")
    try:
        return (_read_npz if path.suffix == ".npz" else _read_safetensors)(path, other)
    except DataError:
        raise
    except (*DAMAGED, safetensors.SafetensorError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: expected a readable {path.suffix} file, got {why}") from None


def _read_npz(path: Path, other: tuple[str, ...]) -> dict[str, np.ndarray | Tensor]:
    """Read the arrays that a dataset has, each to its end, so that its checksum is verified."""
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(f"{path}: expected arrays from numpy.savez, got a single array from numpy.save")
    arrays: dict[str, np.ndarray | Tensor] = {}
    with zipfile.ZipFile(path) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        _check_present(path, members, other)
        for name in sorted(members.keys() & {*KNOWN, *other}):
            with archive.open(members[name]) as content:
                arrays[name] = np.lib.format.read_array(content, allow_pickle=False)
                if content.read(1):
                    raise ValueError(f"more bytes than {name} has")
    return arrays


def _read_safetensors(path: Path, other: tuple[str, ...]) -> dict[str, np.ndarray | Tensor]:
    """Read the tensors, and the class names: a JSON list in the metadata, as the format has no tensors of strings."""
    with safetensors.safe_open(path, framework="pt") as file:
        names_in_file = list(file.keys())
        _check_present(path, names_in_file, other)
        arrays: dict[str, np.ndarray | Tensor] = {
            name: file.get_tensor(name) for name in sorted({*KNOWN, *other}.intersection(names_in_file))
        }
        names = (file.metadata() or {}).get("classes")
    if names is not None:
        texts = json.loads(names)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: expected a list of texts as the metadata `classes`, got other JSON")
        arrays["classes"] = np.array(texts, object)
    return arrays


def _describe(array: np.ndarray | Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _samples(name: str, array: np.ndarray | Tensor) -> Tensor:
    got = _describe(array)
    if array.ndim == 2 and got.startswith(("float", "bfloat")):
        features = torch.as_tensor(array).float()
        if wrong := int((~features.isfinite()).sum()):
            raise DataError(
                f"{name}: expected finite features, got {wrong:,} of {features.numel():,} values infinite or NaN"
            )
        return features
    if got.startswith("uint8") and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))):
        images = torch.as_tensor(array)
        images = images.unsqueeze(3) if images.dim() == 3 else images
        return images.permute(0, 3, 1, 2).contiguous()
    shapes = "uint8 images [n, h, w], [n, h, w, 1] or [n, h, w, 3], or floating-point features [n, d]"
    raise DataError(f"{name}: expected {shapes}, got {got}")


def _labels(name: str, array: np.ndarray | Tensor) -> Labels:
    got = _describe(array)
    if array.ndim != 1 or not got.startswith(("int", "uint")):
        raise DataError(f"{name}: expected integer labels [n], got {got}")
    return array


def _names(array: np.ndarray | Tensor) -> list[str]:
    """Return the names of classes from an array of text, bytes or integers."""
    if array.ndim != 1:
        raise DataError(f"classes: expected names [K], got {_describe(array)}")
    return [
        name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
        for name in array.tolist()
    ]


def _check_shapes(splits: Splits) -> None:
    shape = list(splits["train"][0].shape[1:])
    for split, (x, y) in splits.items():
        _check_lengths(f"_{split}", x, y)
        if list(x.shape[1:]) != shape:
            got = list(x.shape[1:])
            raise DataError(f"x_{split}: expected samples of x_train's shape {shape}, got {got}")


def _check_lengths(split: str, x: Tensor, y: Labels) -> None:
    """Check samples and their labels; `split` is the end of the arrays' names."""
    if 0 in x.shape[1:]:
        raise DataError(f"x{split}: expected samples that are not empty, got the shape {list(x.shape[1:])}")
    if len(x) == 0:
        raise DataError(f"x{split}: expected at least one sample, got none")
    if len(x) != len(y):
        raise DataError(f"y{split}: expected {counted(len(x), 'label')} to match x{split}, got {len(y)}")
