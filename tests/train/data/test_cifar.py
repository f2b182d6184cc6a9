"""Archives in the layout of CIFAR's, with few synthetic images."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load


def archive(path: Path, folder: str, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            raw = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


def cifar(path: Path, classes: int, each: int, rng: np.random.Generator) -> Path:
    """Write a small archive in the layout of CIFAR-100, or of CIFAR-10 for 10 classes. The first pixel is the label."""

    def part(count: int, key: bytes) -> dict[bytes, Any]:
        y = rng.permutation(np.repeat(np.arange(classes), count))
        x = rng.integers(0, 256, (len(y), 3072)).astype(np.uint8)
        x[:, 0] = y
        return {b"data": x, key: y.tolist()}

    if classes == 10:
        batches = {f"data_batch_{i}": part(each // 5, b"labels") for i in range(1, 6)}
        names = {b"label_names": [f"class {k}".encode() for k in range(10)]}
        files = {**batches, "test_batch": part(2, b"labels"), "batches.meta": names}
        return archive(path, "cifar-10-batches-py", files)
    names = {b"fine_label_names": [f"class {k}".encode() for k in range(classes)]}
    files = {"train": part(each, b"fine_labels"), "test": part(2, b"fine_labels"), "meta": names}
    return archive(path, "cifar-100-python", files)


@pytest.mark.parametrize("classes", [10, 20])
def test_cifar_archives(classes: int, tmp_path: Path, seed: int) -> None:
    path = cifar(tmp_path / "cifar.tar.gz", classes, 50, np.random.default_rng(seed))
    data = load(DataConfig(data=str(path), num_classes=classes))
    assert data.train_counts.tolist() == [50] * classes
    assert data.sample_shape == [3, 32, 32]
    assert torch.equal(data.x_train[:, 0, 0, 0].long(), data.y_train)
    assert torch.equal(data.x_test[:, 0, 0, 0].long(), data.y_test)
    assert data.class_names[3] == "class 3"
    tail = load(DataConfig(data=str(path), imbalance_ratio=10))
    expected = [int(50 * 0.1 ** (k / (classes - 1))) for k in range(classes)]
    assert tail.train_counts.tolist() == torch.bincount(tail.y_train).tolist() == expected
    assert len(tail.y_test) == len(data.y_test)


def test_an_archive_with_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("run",)

    path = archive(tmp_path / "a.tar.gz", "cifar-100-python", {"train": Evil(), "test": {}, "meta": {}})
    with pytest.raises(DataError, match=r"expected the files and keys .* got a pickle that uses .*print"):
        load(DataConfig(data=str(path)))
    other = archive(tmp_path / "b.tar.gz", "something", {"train": {}})
    with pytest.raises(
        DataError, match=r"expected an archive with the folder cifar-100-python or .* got something"
    ):
        load(DataConfig(data=str(other)))
    (tmp_path / "c.tar.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="expected a readable tar archive"):
        load(DataConfig(data=str(tmp_path / "c.tar.gz")))
