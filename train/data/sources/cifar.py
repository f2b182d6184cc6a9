"""CIFAR-10 and CIFAR-100, read from the archives that their authors publish."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

#: Folder in the archive -> training files, test file, file of class names, key of the labels, key of the class names.
LAYOUTS: dict[str, tuple[list[str], str, str, bytes, bytes]] = {
    "cifar-100-python": (["train"], "test", "meta", b"fine_labels", b"fine_label_names"),
    "cifar-10-batches-py": (
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "batches.meta",
        b"labels",
        b"label_names",
    ),
}


#: The only globals that unpickling an array needs, under their old and new names.
ALLOWED = {
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts arrays and plain values only: a downloaded pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a pickle that uses {module}.{name}")


def read_cifar(path: Path) -> dict[str, np.ndarray]:
    """Read `cifar-100-python.tar.gz` or `cifar-10-python.tar.gz`.

    Returns:
        The arrays that `arrays.ARRAYS` names, and `classes`.

    Raises:
        DataError: the file is not one of these archives.
    """
    try:
        with tarfile.open(path) as archive:
            folder = next((name.split("/")[0] for name in archive.getnames() if "/" in name), "")
            if folder not in LAYOUTS:
                raise DataError(
                    f"{path}: expected an archive with the folder {' or '.join(LAYOUTS)}, got {folder or 'none'}"
                )
            training, test, meta, labels, names = LAYOUTS[folder]
            batches = [_unpickle(archive, f"{folder}/{name}") for name in training]
            test_batch = _unpickle(archive, f"{folder}/{test}")
            classes = [name.decode() for name in _unpickle(archive, f"{folder}/{meta}")[names]]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path}: expected a readable tar archive, got {error}") from None
    except (KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: expected the files and keys of CIFAR's archive, got {error}") from None
    return {
        "x_train": np.concatenate([_images(batch) for batch in batches]),
        "y_train": np.concatenate([np.asarray(batch[labels], dtype=np.int64) for batch in batches]),
        "x_test": _images(test_batch),
        "y_test": np.asarray(test_batch[labels], dtype=np.int64),
        "classes": np.asarray(classes),
    }


def _unpickle(archive: tarfile.TarFile, name: str) -> dict[bytes, Any]:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    content: dict[bytes, Any] = _Unpickler(io.BytesIO(file.read()), encoding="bytes").load()
    return content


def _images(batch: dict[bytes, Any]) -> np.ndarray:
    return np.ascontiguousarray(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
