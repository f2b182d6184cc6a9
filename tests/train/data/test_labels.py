"""Labels of lists: encodings, blanks, integers, order, and labels that are not 0 to K-1."""

from __future__ import annotations

import codecs
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from train.__main__ import main
from train.config import DataConfig
from train.data.classes import number_classes
from train.data.errors import DataError
from train.data.load import load
from train.data.sources.arrays import load_arrays
from train.data.sources.listing import Listing, read_listing
from train.trained import load_trained

from ..conftest import check_colors
from .test_listing import write_lists

BARCODES = [4006381333931, 9780201379624, 2**63 + 5, 10**30]


def read(path: Path, content: str, trained: Listing | None = None) -> Listing:
    path.write_text(content, encoding="utf-8")
    return read_listing(str(path), trained=trained)


@pytest.mark.parametrize("kind", ["txt", "csv", "json"])
def test_a_byte_order_mark_is_no_content(kind: str, tree: Path, cache: str) -> None:
    path = write_lists(tree, kind)
    for file in tree.glob(f"*.{kind}"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    data = load(DataConfig(data=str(path), image_size=16, cache=cache))
    assert data.train_counts.tolist() == [4, 3, 2]
    check_colors(data.x_train, data.y_train)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
def test_another_encoding_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("path,label\na.jpg,1\ncaf\u00e9.jpg,2\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=rf"^{tmp_path / name}, line 3: expected text in UTF-8, got the byte 0xe9$"
    ):
        read_listing(str(tmp_path / name))
    (tmp_path / name).write_bytes("path,label\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"line 1: expected text in UTF-8, got the byte 0xff$"):
        read_listing(str(tmp_path / name))


def test_accents_are_composed(tmp_path: Path) -> None:
    """One program writes an accented letter as one character, another as two."""
    listing = read(tmp_path / "a.csv", "path,label\na,caf\u00e9\nb,cafe\u0301\n")
    assert listing.classes.names == ["caf\u00e9"]


def test_names_in_utf_8_and_separators_of_unicode_are_kept(tmp_path: Path) -> None:
    listing = read(tmp_path / "a.csv", "path,label\n\u732b/\u2028 1.jpg,\u732b\nb.jpg,\u72ac\n")
    assert listing.classes.names == ["\u72ac", "\u732b"]
    assert listing.files[0].name == "\u2028 1.jpg"
    listing = read(tmp_path / "a.txt", "a\x0c\u2028b.jpg 1\r\nc d.jpg 0\r\n")
    assert [file.name for file in listing.files] == ["a\x0c\u2028b.jpg", "c d.jpg"]


def test_blanks_around_fields_make_no_classes(tmp_path: Path) -> None:
    listing = read(
        tmp_path / "a.csv", 'id, path , label \n1, a.jpg ,cat\n2,b.jpg, cat\t\n3, "c, d.jpg", " cat"\n'
    )
    assert listing.classes.names == ["cat"]
    assert [file.name for file in listing.files] == ["a.jpg", "b.jpg", "c, d.jpg"]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_integers_are_integers_however_they_are_written(kind: str, tmp_path: Path) -> None:
    def content(*labels: str) -> str:
        lines = (f"{i}.jpg{' ' if kind == 'txt' else ','}{label}\n" for i, label in enumerate(labels))
        return ("path,label\n" if kind == "csv" else "") + "".join(lines)

    trained = read(tmp_path / f"train.{kind}", content("10", "2", "3.0", "-1", "3", "+10"))
    assert trained.classes.kind == "number"
    assert trained.classes.names == ["-1", "2", "3", "10"]
    assert trained.labels == [3, 1, 2, 0, 2, 3]
    test = read(tmp_path / f"test.{kind}", content("10.0", "2.", "-1"), trained)
    assert test.labels == [3, 1, 0]
    with pytest.raises(DataError, match=r"got the classes 0, 7 too"):
        read(tmp_path / f"test.{kind}", content("10", "7", "0"), trained)


def test_integers_among_names_come_first_by_value(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"2 of 4 classes are integers, but 'fox' is not"):
        trained = read(tmp_path / "train.csv", "path,label\na,10\nb,fox\nc,2.0\nd,ant\ne,2\n")
    assert trained.classes.names == ["2", "10", "ant", "fox"]
    assert trained.labels == [1, 3, 0, 2, 0]
    assert read(tmp_path / "test.csv", "path,label\na,2\nb,10.0\n", trained).labels == [0, 1]


def test_large_labels_take_the_memory_of_their_number(tmp_path: Path) -> None:
    lines = [f"{i}.jpg {BARCODES[i % 4]}\n" for i in range(40)]
    tracemalloc.start()
    trained = read(tmp_path / "train.txt", "".join(lines))
    numbering = number_classes(
        {"train": np.array(trained.labels)}, trained.classes.names, trained.classes.keys
    )
    arrays = {"train": np.array([2**64 - 1, 7, 2**63, 7], np.uint64), "test": np.array([7, 7])}
    large = number_classes(arrays, None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert numbering.names == [str(code) for code in sorted(BARCODES)]
    assert [sorted(BARCODES)[label] for label in trained.labels] == [BARCODES[i % 4] for i in range(40)]
    assert large.labels["train"].tolist() == [2, 0, 1, 0]
    assert large.labels["test"].tolist() == [0, 0]
    assert large.names == ["7", str(2**63), str(2**64 - 1)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_labels_with_gaps_are_numbered_in_order(
    dtype: type, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    values = np.array([3, 7, 20, 100, 101], dtype)
    changed = arrays | {name: values[arrays[name]] for name in ("y_train", "y_test")}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **changed)
    data, gaps = (load_arrays(str(tmp_path / name)) for name in ("a.npz", "b.npz"))
    assert torch.equal(data.y_train, gaps.y_train)
    assert torch.equal(data.y_test, gaps.y_test)
    assert gaps.class_names == ["3", "7", "20", "100", "101"]
    shown = "3 is class 0, 7 is class 1, 20 is class 2, 100 is class 3, 101 is class 4"
    assert gaps.notes == (f"labels are numbered in their order: {shown}",)
    assert data.notes == ()


@pytest.mark.parametrize("absent", [0, 2, 4])
def test_a_class_without_training_samples_is_left_out_wherever_it_stands(absent: int) -> None:
    names = ["ant", "bee", "cat", "dog", "eel"]
    values = [value for value in range(5) if value != absent]
    numbering = number_classes({"train": np.array(values * 2), "test": np.array(values[::-1])}, names)
    assert numbering.names == [names[value] for value in values]
    assert numbering.labels["train"].tolist() == [0, 1, 2, 3] * 2
    assert numbering.labels["test"].tolist() == [3, 2, 1, 0]
    assert numbering.notes[-1] == f"left out 1 class without training samples: {names[absent]}"
    with pytest.raises(
        DataError, match=f"y_test: expected only classes that y_train has, got {names[absent]} too"
    ):
        number_classes({"train": np.array(values), "test": np.arange(5)}, names)


def test_the_map_is_shown(tree: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lists(tree, "txt")
    for file in tree.glob("*.txt"):
        lines = [line.rsplit(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text(
            "".join(f"{name} {BARCODES[int(label)]}\n" for name, label in lines), encoding="utf-8"
        )
    main(f"doctor --recipe smoke --data {path} --cache {cache} --image-size 16 --num-classes 3".split())
    shown = f"labels are numbered in their order: {BARCODES[0]} is class 0, {BARCODES[1]} is class 1"
    assert shown in " ".join(capsys.readouterr().out.split())


def test_the_map_is_saved(tree: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        f"--recipe smoke --data {write_lists(tree, 'json')} --cache {cache} --num-classes 3 --image-size 16"
    )
    train = f"--runs {tmp_path} --classes-per-batch 2 --batch-size 4 --device cpu --methods plain"
    assert main([*args.split(), *train.split()]) == 0
    assert "10 (ant) is class 0, 15 (bee) is class 1, 20 (cat) is class 2" in " ".join(
        capsys.readouterr().out.split()
    )
    saved = load_trained(tmp_path / "smoke" / "model-plain.safetensors")
    assert saved.class_names == ["ant", "bee", "cat"]
    assert saved.class_labels == ["10", "15", "20"]


def test_a_recipe_may_begin_with_a_byte_order_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_bytes(codecs.BOM_UTF8 + b'data = "nowhere.npz"\nbackbone = "resnet20"\n')
    assert main(["--recipe", str(recipe)]) == 2
    assert "nowhere.npz: expected an existing file, got none" in capsys.readouterr().err
    for content, words in (
        (
            "# caf\u00e9\nlr = 1".encode("latin-1"),
            f"{recipe}, line 1: expected text in UTF-8, got the byte 0xe9",
        ),
        ("lr = 1".encode("utf-16"), f"{recipe}, line 1: expected text in UTF-8, got the byte 0xff"),
        (b"lr = ", f"--recipe: expected a readable TOML file, got {recipe}: "),
        (b"lr = " + 10_000 * b"[", f"--recipe: expected a readable TOML file, got {recipe}: "),
    ):
        recipe.write_bytes(content)
        assert main(["--recipe", str(recipe)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.strip().splitlines()) == 1


def test_class_names_in_json_are_text(tmp_path: Path) -> None:
    """A name with half a surrogate pair cannot be written to a report."""
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 0}],
        "categories": [{"id": 0, "name": "a\ud800"}],
    }
    listing = read(tmp_path / "a.json", json.dumps(content))
    names = number_classes({"train": np.array(listing.labels)}, listing.classes.names).names
    assert names == ["a\\ud800"]
