"""Folders of other names, and samples that are held out class by class, from folders, lists, arrays and archives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from train.__main__ import main
from train.config import DataConfig
from train.data.errors import DataError
from train.data.hold_out import held_out, hold_out
from train.data.labeled import load_labeled
from train.data.load import load, read_listings
from train.data.sources.labels import Classes
from train.data.sources.listing import Listing

from ..conftest import COLORS, COUNTS, check_colors, write_image
from .test_cifar import cifar


def lists(folder: Path, **options: object) -> dict[str, Listing]:
    return read_listings(DataConfig(data=str(folder), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val"), {"train": "train", "test": "val"}),
        (("Train", "Val"), {"train": "Train", "test": "Val"}),
        (("TRAINING", "Validation"), {"train": "TRAINING", "test": "Validation"}),
        (("training", "valid", "test"), {"train": "training", "test": "test", "val": "valid"}),
        (("train", "dev", "Testing"), {"train": "train", "test": "Testing", "val": "dev"}),
    ],
)
def test_splits_have_their_customary_names(
    names: tuple[str, ...], splits: dict[str, str], tmp_path: Path
) -> None:
    for name in names:
        for kind, color in COLORS.items():
            write_image(tmp_path / name / kind / "0.png", color)
    for source in (tmp_path, tmp_path / names[0]):
        found = lists(source)
        assert {split: listing.files[0].parent.parent.name for split, listing in found.items()} == splits
    expected = "no val samples to hold out for" if "val" in splits else "a class with at least two training"
    with pytest.raises(DataError, match=f"^--hold-out: expected {expected}"):  # one image stays for training
        lists(tmp_path, hold_out=0.5)


def test_a_class_may_be_named_as_a_split(tmp_path: Path) -> None:
    for name in ("train", "car", "test"):  # vehicles, and a folder of experiments
        for number in range(2):
            write_image(tmp_path / "Train" / name / f"{number}.png", (250, 10, 10))
        write_image(tmp_path / "Test" / name / "0.png", (250, 10, 10))
    found = lists(tmp_path)
    assert found["train"].classes.names == found["test"].classes.names == ["car", "test", "train"]
    assert lists(tmp_path / "Train", hold_out=0.5)["train"].classes.names == ["car", "test", "train"]


MISTAKES = [
    (
        ("ant", "bee"),
        "expected train/ and test/ (or val/) with a folder per class, got the folders ant, bee; if these are the classes, add --hold-out 0.1, ",
    ),
    (("val/ant", "Test/ant"), "expected train/ with a folder per class, got Test, val alone"),
    (("train/ant", "Train/ant"), "expected one folder of train samples, got Train, train"),
    (("Train/ant",), "expected a list or folder of test images, such as {}/Train/Test or"),
    ((), "expected train/ and test/ (or val/) with a folder per class, got no folder; --hold-out"),
]


@pytest.mark.parametrize(("folders", "words"), MISTAKES)
def test_a_folder_of_another_shape_is_explained(folders: tuple[str, ...], words: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for folder in folders:
        write_image(root / folder / "0.png", (9, 9, 9))
    with pytest.raises(DataError) as error:
        lists(root)
    assert words.replace("{}/Train/", f"{root}/") in str(error.value)
    assert "\n" not in str(error.value)


def make_list(counts: list[int]) -> Listing:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    names = [f"c{k}" for k in range(len(counts))]
    files = [Path(f"{row}.png") for row in range(len(labels))]
    return Listing(files, labels, Classes("name", list(names), names))


def test_each_class_holds_its_share_out_and_keeps_a_sample(seed: int) -> None:
    counts = [1, 2, 4, 5, 14, 16, 100]
    listing = make_list(counts)
    kept, held = hold_out(listing, 0.1, seed)
    assert [Counter(held.labels)[k] for k in range(7)] == [0, 1, 1, 1, 1, 2, 10]
    assert sorted(kept.files + held.files) == sorted(listing.files)
    assert kept.classes == held.classes == listing.classes
    label = dict(zip(listing.files, listing.labels, strict=True))
    assert [label[file] for file in held.files] == held.labels
    most, _ = hold_out(listing, 0.999, seed)
    assert Counter(most.labels) == dict.fromkeys(range(7), 1)
    assert hold_out(listing, 0.1, seed) == (kept, held)


def test_the_split_depends_on_its_seed_alone() -> None:
    listing = make_list([50, 50])
    held = [hold_out(listing, 0.2, seed)[1].files for seed in (0, 1)]
    assert held[0] != held[1]
    expected = [2, 4, 10, 11, 22, 27, 28, 31, 38, 41, 52, 59, 63, 66, 73, 78, 80, 83, 87, 95]
    assert [int(file.stem) for file in held[0]] == expected  # on every machine


def test_a_file_that_is_listed_twice_is_in_one_part() -> None:
    listing = make_list([6, 6])
    twice = Listing(listing.files * 2, listing.labels * 2, listing.classes)
    kept, held = hold_out(twice, 0.5, 0)
    assert not set(kept.files) & set(held.files)
    assert Counter(held.files) == dict.fromkeys(held.files, 2)
    assert len(held) == 12


def test_a_run_on_one_folder(tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "animals"
    for name, color in COLORS.items():
        for i in range(6):
            write_image(folder / name / f"{i}.png", color)
    data = load(DataConfig(data=str(folder), hold_out=0.3, cache=cache, image_size=8))
    assert (len(data.y_train), len(data.y_test), data.x_val) == (12, 6, None)
    check_colors(data.x_test, data.y_test)
    words = f"--data {folder} --cache {cache} --image-size 8 --runs {tmp_path / 'runs'} --device cpu --methods plain"
    short = ["--stage1-epochs", "1", "--stage2-epochs", "0"]
    assert main([*words.split(), *short, "--hold-out", "0.3"]) == 0
    assert (
        "hold_out = 0.3\nhold_out_val = 0.0\nhold_out_seed = 0\n"
        in (tmp_path / "runs" / "animals" / "config.toml").read_text()
    )
    assert main([*words.split(), *short, "--hold-out", "0.3", "--resume"]) == 0
    capsys.readouterr()
    assert main([*words.split(), *short, "--hold-out", "0.3", "--hold-out-seed", "1", "--resume"]) == 2
    message = capsys.readouterr().err
    assert "--hold-out-seed: expected 0 as in" in message or "--data: expected the data" in message


def test_one_folder_gives_test_and_validation_samples(tmp_path: Path, seed: int) -> None:
    counts = {"ant": 1, "bee": 2, "cat": 3, "dog": 20}
    for name, count in counts.items():
        for i in range(count):
            write_image(tmp_path / "set" / name / f"{i}.png", (9, 9, 9))
    alone = lists(tmp_path / "set", hold_out=0.2, hold_out_seed=seed)
    both = lists(tmp_path / "set", hold_out=0.2, hold_out_val=0.25, hold_out_seed=seed)
    assert list(both) == ["train", "test", "val"]
    assert both["test"] == alone["test"]  # so `evaluate --hold-out 0.2` has the same test samples
    numbers = {split: Counter(listing.labels) for split, listing in both.items()}
    assert numbers == {"train": {0: 1, 1: 1, 2: 1, 3: 12}, "test": {1: 1, 2: 1, 3: 4}, "val": {2: 1, 3: 4}}
    files = [file for listing in both.values() for file in listing.files]
    assert sorted(files) == sorted(alone["train"].files + alone["test"].files)
    assert len(set(files)) == 26


def test_validation_samples_are_held_out_once(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    one, other = (load(DataConfig(data=str(path), **{name: 0.2})) for name in ("hold_out", "hold_out_val"))
    assert one.x_val is not None
    assert other.x_val is not None
    assert torch.equal(one.x_val, other.x_val)
    for image in ("train/ant/0", "train/ant/1", "train/ant/2", "test/ant/0"):
        write_image(tmp_path / "set" / f"{image}.png", (9, 9, 9))
    assert list(lists(tmp_path / "set", hold_out_val=0.2)) == ["train", "test", "val"]
    with pytest.raises(DataError, match=r"--hold-out-val: expected 0 with --hold-out, .* got 0.2"):
        load(DataConfig(data=str(path), hold_out=0.1, hold_out_val=0.2))
    with pytest.raises(
        DataError, match=r"--hold-out-val: expected no val samples to .* got those of --hold-out"
    ):
        lists(tmp_path / "set", hold_out=0.1, hold_out_val=0.2)


def test_arrays_have_no_other_lists(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """They were ignored, so that epochs were evaluated on the test samples in spite of --val-data."""
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    for name, value in {
        "val_data": "v.npz",
        "test_data": "t.npz",
        "images": "i",
        "path_prefixes": ("a=b",),
    }.items():
        option = f"--{name.replace('_', '-')}"
        for data in (str(path), "fashion-mnist-lt"):
            with pytest.raises(
                DataError, match=f"^{option}: expected none unless --data is a list or a folder"
            ):
                load(DataConfig(data=data, **{name: value}))  # type: ignore[arg-type]


def test_data_of_an_unknown_kind_are_refused_before_their_options(tmp_path: Path) -> None:
    """The message was that --images needs a list, about a list of another name."""
    path = tmp_path / "train.tsv"
    path.write_text("a/0.png 0\n")
    for read in (load, load_labeled):
        with pytest.raises(DataError, match=r"train.tsv: expected .* a list named .txt, .csv or .json"):
            read(DataConfig(data=str(path), images=str(tmp_path)))


@pytest.mark.parametrize("kind", ["npz", "safetensors", "features", "archive"])
def test_arrays_hold_validation_samples_out(
    kind: str,
    arrays: dict[str, np.ndarray],
    feature_arrays: dict[str, np.ndarray],
    tmp_path: Path,
    seed: int,
) -> None:
    path = tmp_path / f"data.{'npz' if kind == 'features' else kind}"
    if kind == "safetensors":
        safetensors.torch.save_file({name: torch.from_numpy(x) for name, x in arrays.items()}, path)
    elif kind == "archive":
        path = cifar(tmp_path / "cifar.tar.gz", 12, 60, np.random.default_rng(seed))
    else:
        np.savez(path, **(arrays if kind == "npz" else feature_arrays))
    ratio = 6.0 if kind == "archive" else 1.0
    whole = load(DataConfig(data=str(path), imbalance_ratio=ratio))
    data = load(DataConfig(data=str(path), imbalance_ratio=ratio, hold_out=0.2, hold_out_seed=seed))
    assert data.x_val is not None
    assert data.y_val is not None
    expected = [max(1, round(0.2 * count)) for count in whole.train_counts.tolist()]
    assert torch.bincount(data.y_val, minlength=data.num_classes).tolist() == expected
    assert data.train_counts.tolist() == (whole.train_counts - torch.tensor(expected)).tolist()
    assert torch.bincount(data.y_train).tolist() == data.train_counts.tolist()
    mask = torch.from_numpy(held_out(whole.y_train.numpy(), 0.2, seed))
    assert torch.equal(data.x_val, whole.x_train[mask])
    assert torch.equal(data.y_val, whole.y_train[mask])
    assert torch.equal(data.x_train, whole.x_train[~mask])
    assert torch.equal(data.y_train, whole.y_train[~mask])
    assert torch.equal(data.x_test, whole.x_test)
    assert torch.equal(data.y_test, whole.y_test)
    assert data.eval_split[0] == "validation"


def test_a_folder_with_the_name_of_a_dataset_has_no_influence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-mnist-lt").mkdir()
    assert load(DataConfig(data="fashion-mnist-lt", hold_out=0.1)).x_val is not None


def test_arrays_and_lists_hold_the_same_positions_out(seed: int) -> None:
    listing = make_list([9, 1, 20, 3])
    order = np.random.default_rng(seed).permutation(len(listing))
    mixed = Listing([listing.files[i] for i in order], [listing.labels[i] for i in order], listing.classes)
    mask = held_out(np.array(mixed.labels), 0.3, seed)
    held = hold_out(mixed, 0.3, seed)[1]
    assert held.files == [file for file, is_held in zip(mixed.files, mask, strict=True) if is_held]


def test_arrays_that_cannot_hold_samples_out(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays, x_val=arrays["x_test"], y_val=arrays["y_test"])
    with pytest.raises(DataError, match="--hold-out: expected no validation samples to hold out for, got"):
        load(DataConfig(data=str(path), hold_out=0.2))
    one = np.unique(arrays["y_train"], return_index=True)[1]
    single = {**arrays, "x_train": arrays["x_train"][one], "y_train": arrays["y_train"][one]}
    np.savez(path, **single)
    with pytest.raises(DataError, match="expected a class with at least two training samples, got none"):
        load(DataConfig(data=str(path), hold_out=0.2))


def test_a_run_on_arrays(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = sum(max(1, round(0.1 * count)) for count in COUNTS)
    words = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 4 --hold-out 0.1"
    assert main([*words.split(), *f"--device cpu --methods plain --runs {tmp_path}".split()]) == 0
    assert f"{held} for validation" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines if line["event"] == "epoch"} == {"validation"}
    assert lines[-1]["split"] == "test"
    assert main(["doctor", *words.split()]) == 0
    assert f"validation: {held} samples" in capsys.readouterr().out
