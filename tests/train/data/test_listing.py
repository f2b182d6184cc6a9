"""Lists, COCO files and folders in the layouts of published datasets, with few synthetic images."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from train.__main__ import main
from train.config import DataConfig
from train.data.errors import DataError
from train.data.load import load
from train.data.sources.listing import read_listing

from ..conftest import COLORS, check_colors, write_image


def entries(tree: Path, part: str) -> list[tuple[str, int]]:
    names = list(COLORS)
    return [
        (str(f.relative_to(tree)), names.index(f.parent.name)) for f in sorted((tree / part).rglob("*.*"))
    ]


def write_lists(tree: Path, kind: str) -> Path:
    """Write the lists of both splits in the layout of a published dataset; return the path of the training list."""
    for part in ("train", "val"):
        pairs = entries(tree, part)
        path = tree / f"Made_Up_{part}.{kind}"
        if kind == "txt":
            path.write_text("".join(f"{name} {label}\n" for name, label in pairs))
        elif kind == "csv":
            with open(path, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "image", "label"])
                writer.writerows((i, name, list(COLORS)[label]) for i, (name, label) in enumerate(pairs))
        else:  # as in iNaturalist, annotations are in another order than images, and ids do not start at 0
            images = [{"id": 900 + i, "file_name": name} for i, (name, _) in enumerate(pairs)]
            notes = [{"image_id": 900 + i, "category_id": 10 + 5 * k} for i, (_, k) in enumerate(pairs)]
            categories = [{"id": 10 + 5 * k, "name": name} for k, name in enumerate(COLORS)]
            path.write_text(
                json.dumps({"images": images, "annotations": notes[::-1], "categories": categories})
            )
    return tree / f"Made_Up_train.{kind}"


@pytest.mark.parametrize("kind", ["txt", "csv", "json", "folder"])
def test_every_layout_gives_the_same_dataset(kind: str, tree: Path, cache: str) -> None:
    source = tree if kind == "folder" else write_lists(tree, kind)
    data = load(DataConfig(data=str(source), image_size=16, cache=cache))
    assert data.sample_shape == [3, 16, 16]
    assert data.train_counts.tolist() == [4, 3, 2]
    assert torch.bincount(data.y_test).tolist() == [1, 1, 1]
    check_colors(data.x_train, data.y_train)
    check_colors(data.x_test, data.y_test)
    assert data.class_names == (["0", "1", "2"] if kind == "txt" else list(COLORS))


def test_prefixes_and_roots(tree: Path, cache: str) -> None:
    """Paths in the lists of Places-LT do not fit the layout of another download."""
    path = write_lists(tree, "txt")
    path.write_text("".join(f"data_256/{name[6:]} {label}\n" for name, label in entries(tree, "train")))
    elsewhere = path.parent.parent / "lists"
    elsewhere.mkdir()
    for file in tree.glob("*.txt"):
        file.rename(elsewhere / file.name)
    source = DataConfig(
        data=str(elsewhere / path.name),
        images=str(tree),
        path_prefixes=("data_256/=train/",),
        image_size=8,
        cache=cache,
    )
    check_colors(*dataclasses.astuple(load(source))[:2])
    with pytest.raises(DataError, match=r"9 of 9 images of the train split that cannot be read: .*data_256"):
        load(dataclasses.replace(source, path_prefixes=()))
    with pytest.raises(DataError, match="--path-prefixes: expected OLD=NEW, got 'data_256'"):
        load(dataclasses.replace(source, path_prefixes=("data_256",)))


def test_a_list_with_fewer_categories_keeps_the_training_labels(tree: Path, cache: str) -> None:
    path = write_lists(tree, "json")
    for part in ("train", "val"):
        content = json.loads((tree / f"Made_Up_{part}.json").read_text())
        del content["categories"]
        if part == "val":  # only bees and cats
            content["annotations"] = [note for note in content["annotations"] if note["category_id"] != 10]
        (tree / f"Made_Up_{part}.json").write_text(json.dumps(content))
    data = load(DataConfig(data=str(path), image_size=16, cache=cache))
    assert data.y_test.tolist() == [2, 1]
    check_colors(data.x_test, data.y_test)


def test_lists_must_identify_classes_in_the_same_way(tree: Path, cache: str) -> None:
    by_number, by_id, by_name = (str(write_lists(tree, kind)) for kind in ("txt", "json", "csv"))
    for train, test, words in (
        (by_number, by_name, r"Made_Up_train\.csv: expected classes by number, as .*, got classes by name"),
        (by_number, by_id, "expected classes by number, as in the training list, got classes by COCO id"),
        (by_id, by_number, "expected classes by COCO id, as in the training list, got classes by number"),
        (by_name, by_number, "expected only classes of the training list, got the classes 0, 1, 2 too"),
        (by_name, by_id, "expected classes by name, as in the training list, got classes by COCO id"),
    ):
        with pytest.raises(DataError, match=words):
            load(DataConfig(data=train, test_data=test, cache=cache))


def test_a_name_may_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("path,label\na.png,12\nb.png,fox\n")
    (tmp_path / "test.csv").write_text("path,label\nc.png,12\n")
    mixed = "1 of 2 classes are integers, but 'fox' is not, so all are names"
    with pytest.warns(RuntimeWarning, match=rf"train\.csv: {mixed}"):
        trained = read_listing(str(tmp_path / "train.csv"))
    assert trained.classes.names == ["12", "fox"]
    assert read_listing(str(tmp_path / "test.csv"), trained=trained).labels == [0]


WRONG: list[tuple[str, str, str]] = [
    (
        "a.txt",
        "one.jpg 3\ntwo.jpg\n",
        r"a\.txt, line 2: expected `relative/path\.jpg label` .*, got 'two\.jpg'",
    ),
    ("a.txt", "one.jpg x3\n", r"line 1: expected"),
    ("a.txt", "one\0.jpg 3\n", r"a\.txt, line 1: expected the path of a file, got 'one\\x00.jpg'"),
    ("a.txt", "\n", "expected at least one image, got none"),
    (
        "a.csv",
        "id,name\n1,x\n",
        r"a\.csv: expected a header in the first line, with one of the columns path, .* got id, name",
    ),
    ("a.csv", "path,label\nx.jpg,\n", r"a\.csv, line 2: expected a path and a label"),
    (
        "a.csv",
        'path,label\nx.jpg,a\n"y.jpg,b\nz.jpg,c\n',
        r"a\.csv, line 3: expected a record of CSV, got unexpected end",
    ),
    (
        "a.csv",
        'path,label\n"x.jpg,a\ny.jpg",b\n',
        r"a\.csv, line 2: expected a closing quote in the line, got none",
    ),
    ("a.csv", "path,label\nx,y.jpg,a\n", r"a\.csv, line 2: expected 2 fields as in the header, got 3"),
    (
        "a.csv",
        "path,label\nx.jpg,3\ny.jpg,03\n",
        r"a\.csv: expected one spelling of each label, got 3 and 03",
    ),
    ("a.csv", "path,label, label\nx.jpg,3,4\n", r"a\.csv: expected one column label, got several"),
    ("a.csv", "", r"a\.csv: expected a header in the first line, with .* got no header"),
    ("a.csv", "x.jpg,3\ny.jpg,4\n", r"a\.csv: expected a header in the first line, with .* got x\.jpg, 3"),
    ("a.txt", "", r"a\.txt: expected at least one image, got none"),
    ("a.md", "", "expected a folder of class folders, or a list named"),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_invalid_lists(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_listing(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_blank_lines_of_csv_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(" ,\npath,label\n\n  \nx.jpg,a\n,\n , ,\ny.jpg,b\n,,\n")
    listing = read_listing(str(tmp_path / "a.csv"))
    assert [file.name for file in listing.files] == ["x.jpg", "y.jpg"]
    assert listing.classes.names == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data nope", "--data: nope: expected an existing folder or file, or fashion-mnist-lt, glyphs, got none"),
        ("--data nope.csv", "--data: nope.csv: expected an existing file, got none"),
        ("--data nope.tar.gz", "--data: nope.tar.gz: expected an existing file, got none"),
        ("--data TREE --test-data nope", "--test-data: nope: expected an existing file, got none"),
        ("--data TREE --val-data nope.txt", "--val-data: nope.txt: expected an existing file, got none"),
        ("--data TREE --images nope", "--images: expected an existing folder, got nope"),
        ("--data TREE --cache TREE/file", "--cache: expected a folder that can be written, got "),
        ("--data TREE --path-prefixes x", "--path-prefixes: expected OLD=NEW, got 'x'"),
        ("--data FLAT", "--data: FLAT: expected train/ with a folder per class, got no class folders in train/"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["", "doctor "])
def test_the_option_at_fault_is_named_alone(
    command: str, words: str, message: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "file").write_text("")
    for part in ("train", "test"):
        write_image(tmp_path / "flat" / part / "0.png", (1, 1, 1))
    if "prefixes" in words:
        words = words.replace("TREE", str(write_lists(tree, "txt")))

    def filled(text: str) -> str:
        return text.replace("TREE", str(tree)).replace("FLAT", str(tmp_path / "flat"))

    cached = "" if "--cache" in words else f" --cache {tmp_path / 'cache'}"
    assert main(f"{command}{filled(words)} --device cpu{cached} --runs {tmp_path / 'runs'}".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {filled(message)}")
    assert line.count("--") == 1


def test_missing_files_and_folders_are_named(tree: Path, cache: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: expected an existing file, got none"):
        read_listing("nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder with images for each class"):
        read_listing(str(tmp_path / "empty"))
    path = write_lists(tree, "txt")
    (tree / "Made_Up_val.txt").unlink()
    with pytest.raises(
        DataError, match=r"--test-data: expected .*Made_Up_test\.txt or .*Made_Up_val\.txt, got none"
    ):
        load(DataConfig(data=str(path), cache=cache))
    with pytest.raises(DataError, match="--test-data: expected a list of test images, as the name of"):
        load(DataConfig(data=str(path.rename(tree / "some.txt")), cache=cache))
    (tree / "val" / "dog").mkdir()
    write_image(tree / "val" / "dog" / "0.png", (1, 1, 1))
    with pytest.raises(
        DataError, match="expected only classes of the training list, got the classes dog too"
    ):
        load(DataConfig(data=str(tree), cache=cache))


def test_training_on_a_folder_and_the_doctor(
    tree: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = f"--recipe smoke --data {tree} --cache {cache} --num-classes 3 --image-size 16"
    common += " --classes-per-batch 2"
    train = f"--runs {tmp_path} --batch-size 4 --device cpu --methods plain"
    assert main(["doctor", *common.split()]) == 0
    said = capsys.readouterr().out
    assert "3 classes, samples [3, 16, 16]" in said
    assert "training: 9 samples, 4 to 2 per class" in said
    assert "no problems" in said
    assert main([*common.split(), *train.split()]) == 0
    assert (tmp_path / "smoke" / "model-plain.safetensors").is_file()


def test_contradictory_labels_are_named(tree: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree / "list_train.csv"
    lines = ["train/ant/0.png,ant", "train/bee/0.png,bee", "train/ant/0.png,bee", "train/bee/0.png,bee"]
    path.write_text("\n".join(["path,label", *lines]))
    (tree / "list_test.csv").write_text("path,label\nval/ant/0.jpg,ant\nval/bee/0.jpg,bee\n")
    expected = f"{path}: labels contradict each other, 1 image with several labels: {tree}/train/ant/0.png (ant, bee)"
    with pytest.warns(RuntimeWarning) as warned:
        load(DataConfig(data=str(path), cache=cache, image_size=8))
    assert [str(warning.message) for warning in warned] == [expected]
    args = f"doctor --recipe smoke --data {path} --cache {cache} --num-classes 2 --image-size 16"
    assert main([*args.split(), "--classes-per-batch", "2", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out.count("labels contradict") == 1
    assert f"problem: {expected}\n" in said.out
    assert "problem: 1 training image is listed more than once\n" in said.out
    assert "contradict" not in said.err


def test_the_doctor_lists_problems(tree: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lists(tree, "txt")
    (tree / "train" / "ant" / "0.png").unlink()
    (tree / "train" / "ant" / "1.png").write_bytes(b"nothing")
    with open(tree / "Made_Up_val.txt", "a") as file:
        file.write("train/bee/0.png 1\n")
    (tree / "Made_Up_val.txt").write_text(
        "".join(line for line in (tree / "Made_Up_val.txt").read_text().splitlines(True) if "cat" not in line)
    )
    args = f"doctor --recipe smoke --data {path} --cache {cache} --num-classes 3 --image-size 16"
    assert main([*args.split(), "--classes-per-batch", "2"]) == 1
    said = capsys.readouterr().out
    for words in (
        "1 of 9 training images does not exist",
        "1 image is in the training and the test list",
        "left out 2 of 9 images of the train split that cannot be read",
        "1 class without a test sample: 2",
        "4 problems",
    ):
        assert words in said, said
