"""Archives in the layout of CIFAR's, with few synthetic images."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load

META = {b"fine_label_names": [b"ant", b"bee"]}


def archive(path: Path, folder: str, files: dict[str, Any]) -> Path:
    """Write an archive of pickles. Bytes are the content of a file."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
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

    path = archive(tmp_path / "a.tar.gz", "cifar-100-python", {"train": Evil(), "test": {}, "meta": META})
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


def test_archives_packed_in_other_ways(tmp_path: Path, seed: int) -> None:
    """Names with a leading "./", a plain tar, and a file of macOS before the folder."""
    path = cifar(tmp_path / "a.tar.gz", 10, 10, np.random.default_rng(seed))
    data = load(DataConfig(data=str(path)))
    with tarfile.open(path) as source, tarfile.open(tmp_path / "b.tar", "w") as target:
        target.addfile(tarfile.TarInfo("./._cifar-10-batches-py"))
        for member in source:
            content = source.extractfile(member)
            member.name = f"./{member.name}"
            target.addfile(member, content)
    assert load(DataConfig(data=str(tmp_path / "b.tar"))).fingerprint() == data.fingerprint()


def test_a_flipped_byte_is_found(tmp_path: Path, seed: int) -> None:
    path = cifar(tmp_path / "a.tar.gz", 10, 10, np.random.default_rng(seed))
    whole = path.read_bytes()
    for position in (
        *range(100, len(whole), len(whole) // 9),
        len(whole) - 6,
    ):  # the last one is in the checksum
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"a\.tar\.gz: expected a readable tar archive, got"):
            load(DataConfig(data=str(path)))
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match="expected a readable tar archive, got"):
        load(DataConfig(data=str(path)))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


BOMBS = {
    "a file": header("cifar-100-python/train", 3 << 30),
    "an unknown file": header("cifar-100-python/more", 3 << 30),
    "the header of a long name": header("x", 3 << 30, tarfile.GNUTYPE_LONGNAME),
    "an extended header": header("x", 3 << 30, tarfile.XHDTYPE),
    "many files": b"".join(header(f"cifar-100-python/{i}", 0) for i in range(1001)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_archive_of_gigabytes_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(BOMBS[kind]) + 3072 * gzip.compress(bytes(1 << 20)))
    assert path.stat().st_size < 4 << 20
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"expected a readable tar archive, got .*(more than|larger than|bytes in)"
    ):
        load(DataConfig(data=str(path)))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


PIXELS = np.zeros((2, 3072), np.uint8)
OTHER: list[tuple[dict[str, Any], str]] = [
    ({"meta": [1]}, "meta of the type list instead of a dictionary"),
    ({"meta": {b"fine_label_names": 3}}, "'fine_label_names' in cifar-100-python/meta that is not a list"),
    (
        {"meta": {b"fine_label_names": [b"a", 7]}},
        "'fine_label_names' in .*/meta with an entry that is not a name",
    ),
    ({"train": {b"fine_labels": [0, 1]}}, "no 'data' in cifar-100-python/train"),
    ({"train": {b"data": PIXELS}}, "no 'fine_labels' in cifar-100-python/train"),
    (
        {"train": {b"data": [1, 2], b"fine_labels": [0, 1]}},
        "'data' in .*/train of the type list instead of uint8",
    ),
    (
        {"train": {b"data": PIXELS[:, :9], b"fine_labels": [0, 1]}},
        r"of the shape \[2, 9\] instead of \[n, 3072\]",
    ),
    ({"train": {b"data": PIXELS, b"fine_labels": [0]}}, "1 labels for 2 images in cifar-100-python/train"),
    (
        {"train": {b"data": PIXELS, b"fine_labels": [0, "1"]}},
        "'fine_labels' in .* that is not a list of integers",
    ),
    (
        {"test": {b"data": PIXELS, b"fine_labels": [0, 2]}},
        "a label outside of 0 to 1 in cifar-100-python/test",
    ),
    (
        {"test": {b"data": PIXELS, b"fine_labels": [0, -1]}},
        "a label outside of 0 to 1 in cifar-100-python/test",
    ),
    ({"test": b"not a pickle"}, "a damaged pickle .* in cifar-100-python/test"),
    ({"test": b""}, "a damaged pickle .* in cifar-100-python/test"),
]


@pytest.mark.parametrize(("files", "words"), OTHER, ids=[words[:40] for _, words in OTHER])
def test_other_content_is_named(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    batch = {b"data": PIXELS, b"fine_labels": [0, 1]}
    path = archive(
        tmp_path / "a.tar.gz", "cifar-100-python", {"train": batch, "test": batch, "meta": META} | files
    )
    with pytest.raises(
        DataError, match=f"a.tar.gz: expected the files and keys of CIFAR's archive, got .*{words}"
    ) as caught:
        load(DataConfig(data=str(path)))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", "cifar-100-python", {"meta": META})
    with pytest.raises(DataError, match="got no file cifar-100-python/train"):
        load(DataConfig(data=str(path)))
