"""Folders of class folders: each entry is an image of a class, or is named with the reason why it is left out."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from train.__main__ import main
from train.cli import parse_run
from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load
from train.data.sources.folders import read_folder
from train.run import announce

from ..conftest import write_image


def found(path: Path) -> tuple[list[str], list[str]]:
    """Return the images and their classes, and what is left out, in words."""
    images, left_out = read_folder(path)
    return [f"{file.relative_to(path)} {name}" for file, name in images], [str(entry) for entry in left_out]


def test_images_are_sorted_by_path_and_subfolders_belong_to_the_class(tmp_path: Path) -> None:
    names = ["b/x.png", "b/sub/2.JPG", "b/sub-1.png", "b/sub/1.png", "a b/ü.jfif", "a b/album.jpg/1.png"]
    for name in names:
        write_image(tmp_path / "images.png", (1, 2, 3))
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "images.png", tmp_path / "set" / name)
    images, left_out = found(tmp_path / "set")
    assert left_out == []
    assert images == [f"{name} {name.split('/')[0]}" for name in map(str, sorted(map(Path, names)))]


def test_composed_and_decomposed_accents_are_one_class(tree: Path, cache: str) -> None:
    (tree / "train" / "ant").rename(tree / "train" / "\u00e9t\u00e9")
    (tree / "val" / "ant").rename(tree / "val" / "e\u0301te\u0301")
    data = load(DataConfig(data=str(tree), image_size=8, cache=cache))
    assert data.class_names == ["bee", "cat", "\u00e9t\u00e9"]
    assert torch.bincount(data.y_test).tolist() == [1, 1, 1]


def test_hidden_entries_are_neither_classes_nor_images(tree: Path) -> None:
    train = tree / "train"
    before, _ = found(train)
    shutil.copytree(train / "ant", train / ".ipynb_checkpoints")
    shutil.copytree(train / "ant", train / "bee" / ".ipynb_checkpoints")
    shutil.copytree(train / "ant", train / "__MACOSX")
    (train / "cat" / "._0.png").write_bytes(b"resource fork")
    assert found(train) == (
        before,
        [
            "4 hidden files and folders: .ipynb_checkpoints, __MACOSX, bee/.ipynb_checkpoints, cat/._0.png",
        ],
    )


def test_what_is_left_out_is_named(tree: Path) -> None:
    train = tree / "train"
    before, _ = found(train)
    (train / "empty").mkdir()
    (train / "phone").mkdir()
    for i in range(3):
        (train / "phone" / f"{i}.heic").write_bytes(b"x")
    (train / "ant" / "Thumbs.db").write_bytes(b"x")
    (train / "README").write_text("x")
    write_image(train / "stray.png", (1, 2, 3))
    (train / "dog").symlink_to(tree / "nowhere")
    os.mkfifo(train / "ant" / "pipe.png")
    images, left_out = found(train)
    assert images == before
    assert left_out == [
        "5 files without the suffix of an image: .heic (3), .db (1), no suffix (1)",
        "1 image outside of the class folders: stray.png",
        "2 class folders without images, which are no classes: empty (empty), phone (3 .heic)",
        "1 broken link: dog",
        "1 device, pipe or socket: ant/pipe.png",
    ]


def test_links_to_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    train = tree / "train"
    write_image(tmp_path / "elsewhere" / "9.png", (1, 2, 3))
    (train / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (train / "dog").symlink_to(tmp_path / "elsewhere")
    (train / "bee" / "up").symlink_to(train)
    (train / "cat" / "self").symlink_to(train / "cat")
    (train / "cat" / "same").mkdir()
    (train / "cat" / "same" / "other").symlink_to(tmp_path / "elsewhere")
    (train / "cat" / "twice").symlink_to(tmp_path / "elsewhere")
    images, left_out = found(train)
    assert [image for image in images if "9.png" in image] == [
        "ant/more/9.png ant",
        "cat/same/other/9.png cat",
        "dog/9.png dog",
    ]
    assert len(images) == 9 + 3
    assert left_out == ["3 links to folders that are read already: bee/up, cat/self, cat/twice"]


def test_a_broken_link_to_an_image_is_an_unreadable_image(tree: Path, cache: str) -> None:
    (tree / "train" / "ant" / "0.png").unlink()
    (tree / "train" / "ant" / "0.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1 of 9 images of the train split that cannot be read: .*0\.png"):
        load(DataConfig(data=str(tree), image_size=8, cache=cache))


@pytest.fixture
def locked_tree(tree: Path) -> Iterator[Path]:
    """The tree in a place that every user can read, but for one class folder."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "set"
        shutil.copytree(tree, copy)
        for folder in (Path(place), copy, *copy.rglob("*/")):
            folder.chmod(0o777)
        (copy / "train" / "bee").chmod(0)
        user = os.geteuid()
        if user == 0:  # nothing is unreadable for root
            os.seteuid(65534)
        try:
            yield copy
        finally:
            os.seteuid(user)
            (copy / "train" / "bee").chmod(0o755)


def test_a_folder_without_permission_stops_the_run(locked_tree: Path) -> None:
    source = DataConfig(data=str(locked_tree), image_size=8, cache=str(locked_tree / "cache"))
    unreadable = r"1 folder that cannot be read: bee \(Permission denied\)"
    with pytest.raises(DataError, match=rf"got the classes bee too; the training folder has {unreadable}"):
        load(source)
    shutil.rmtree(locked_tree / "val" / "bee")
    with pytest.raises(DataError, match=rf"folders of the train split that can be read, got {unreadable}"):
        load(source)
    with pytest.warns(RuntimeWarning, match=unreadable):
        data = load(dataclasses.replace(source, unreadable="skip"))
    assert data.class_names == ["ant", "cat"]
    images, left_out = found(locked_tree / "train")
    assert {image.split()[1] for image in images} == {"ant", "cat"}
    assert left_out == ["1 folder that cannot be read: bee (Permission denied)"]
    with pytest.raises(DataError, match=r"bee: expected a folder that can be read, got Permission denied"):
        read_folder(locked_tree / "train" / "bee")


def test_names_that_are_no_text(tree: Path, cache: str) -> None:
    """A folder's name may be any bytes. The name of the class is text that can be printed and written."""
    raw = os.fsencode(tree / "train" / "ant")
    for part in (b"train", b"val"):
        os.rename(raw.replace(b"train", part), raw.replace(b"train", part).replace(b"ant", b"\xff\xfe"))
    os.rename(
        os.fsencode(tree / "train") + b"/\xff\xfe/0.png", os.fsencode(tree / "train") + b"/\xff\xfe/\x80.png"
    )
    data = load(DataConfig(data=str(tree), image_size=8, cache=cache))
    assert data.class_names == ["bee", "cat", "\\udcff\\udcfe"]
    assert data.train_counts.tolist() == [3, 2, 4]


def test_the_doctor_and_a_run_say_what_is_left_out(
    tree: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tree / "train"
    common = f"--recipe smoke --data {tree} --cache {cache} --num-classes 3 --image-size 16 --classes-per-batch 2".split()
    shutil.copytree(train / "ant", train / ".ipynb_checkpoints")
    hidden = "left out of the train split: 1 hidden file or folder: .ipynb_checkpoints"
    assert main(["doctor", *common]) == 0
    said = capsys.readouterr().out
    assert f"\n{hidden}\n" in said
    assert "no problems" in said
    (train / "dog").mkdir()
    empty = "left out of the train split: 1 class folder without images, which is no class: dog (empty)"
    assert main(["doctor", *common]) == 1
    assert f"problem: {empty}\n" in capsys.readouterr().out
    config, said_at_start = parse_run(common), io.StringIO()
    with pytest.warns(RuntimeWarning, match=re.escape(empty)):
        data = load(config.data)
    announce(Console(file=said_at_start), config, data, None)
    assert f"\n{hidden}\n" in said_at_start.getvalue()


def test_a_folder_of_nothing_says_what_it_has(tmp_path: Path, cache: str) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "0.heic").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"with images for each class, got 1 file without .*: \.heic \(1\); 1 cl"
    ):
        read_folder(tmp_path / "set")
    source = DataConfig(data=str(tmp_path / "set"), test_data=str(tmp_path / "set"), cache=cache)
    with pytest.raises(DataError, match="with images for each class"):
        load(source)
