"""Image files decoded once into the cache: unreadable files, retries, changes, several processes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load
from train.data.sources import decode

from ..conftest import check_colors, write_image


def test_unreadable_images_are_named(tree: Path, cache: str) -> None:
    (tree / "train" / "ant" / "0.png").write_bytes(b"no image at all")
    whole = (tree / "train" / "bee" / "1.png").read_bytes()
    (tree / "train" / "bee" / "1.png").write_bytes(whole[: len(whole) // 2])
    source = DataConfig(data=str(tree), image_size=16, cache=cache)
    with pytest.raises(
        DataError,
        match=r"2 of 9 images of the train split that cannot be read: .*0\.png.*; .*1\.png.* \(--unreadable skip",
    ):
        load(source)
    with pytest.warns(RuntimeWarning, match=r"left out 2 of 9 images of the train split that cannot be read"):
        data = load(dataclasses.replace(source, unreadable="skip"))
    assert data.train_counts.tolist() == [3, 2, 2]
    check_colors(data.x_train, data.y_train)
    assert sum(file.stat().st_size for file in Path(cache).rglob("*.u8")) == (7 + 3) * 16 * 16 * 3
    (tree / "train" / "bee" / "1.png").write_bytes(whole)
    with pytest.warns(
        RuntimeWarning, match=r"left out 1 of 9 images of the train split that cannot be read: .*0\.png"
    ):
        data = load(dataclasses.replace(source, unreadable="skip"))
    assert data.train_counts.tolist() == [3, 3, 2]
    check_colors(data.x_train, data.y_train)


def test_temporary_read_errors_are_retried(tree: Path, cache: str) -> None:
    """The file's size and time do not change, so the cached array stays valid for the list."""
    file = tree / "train" / "ant" / "2.png"
    whole, times = file.read_bytes(), file.stat()
    source = DataConfig(data=str(tree), image_size=16, cache=cache)
    for content, trouble in ((bytes(len(whole)), True), (whole, False)):
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if trouble:
            with pytest.raises(
                DataError, match=r"1 of 9 images of the train split that cannot be read: .*2\.png"
            ):
                load(source)
        else:
            data = load(source)
    assert data.train_counts.tolist() == [4, 3, 2]
    check_colors(data.x_train, data.y_train)


def test_images_are_decoded_once(tree: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataConfig(data=str(tree), image_size=16, cache=cache)
    first = load(source)
    assert not list(Path(cache).glob(".*")), "an incomplete folder was left"

    def never(*_: Any) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(decode, "_decode_all", never)
        again = load(source)
    assert torch.equal(first.x_train, again.x_train)
    assert first.fingerprint() == again.fingerprint()
    write_image(tree / "train" / "ant" / "0.png", (0, 0, 0))  # another image with the same name
    changed = load(source)
    assert not torch.equal(changed.x_train, first.x_train)


def test_a_replaced_file_of_equal_size_and_time_is_decoded(tree: Path, cache: str) -> None:
    """`cp -p` and `tar` restore the time of the content, but no program sets the time of the inode's last change."""
    file = tree / "train" / "ant" / "0.bmp"
    (tree / "train" / "ant" / "0.png").unlink()
    write_image(file, (0, 0, 0))
    source = DataConfig(data=str(tree), image_size=8, cache=cache)
    assert load(source).x_train[0].max() == 0
    before = file.stat()
    write_image(tree / "new.bmp", (255, 255, 255))
    os.utime(tree / "new.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tree / "new.bmp", file)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load(source).x_train[0].min() == 255


def test_many_images_by_several_processes(tmp_path: Path, cache: str) -> None:
    for i in range(150):
        for part in ("train", "test"):
            write_image(tmp_path / "set" / part / f"class {i % 3}" / f"{i}.png", (i, 0, 255 - i), (9, 9))
    data = load(DataConfig(data=str(tmp_path / "set"), image_size=9, cache=cache))
    assert data.train_counts.tolist() == [50, 50, 50]
    reds = data.x_train[:, 0, 4, 4]
    order = sorted(range(150), key=lambda i: (i % 3, f"{i}.png"))
    assert reds.tolist() == order
