"""The validation split is found, epochs are evaluated on it, and results use the test split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.__main__ import main
from train.config import DataConfig
from train.data.load import load
from train.data.sources.arrays import load_arrays

OPTIONS = "--recipe smoke --num-classes 5 --classes-per-batch 4 --device cpu --methods plain"


def write_images(folder: Path, parts: dict[str, int]) -> None:
    """Write folders of classes. The level of an image identifies its split."""
    for level, (part, count) in enumerate(parts.items()):
        for name in ("ape", "bee"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (60 * level, 0, 0))
                image.save(folder / part / name / f"{i}.png")


def test_epochs_use_the_validation_split_and_results_the_test_split(
    arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays["x_val"], arrays["y_val"] = arrays["x_train"][:30], arrays["y_train"][:30]
    arrays["y_test"] = (arrays["y_test"] + 1) % 5  # a trained classifier is wrong on it
    np.savez(tmp_path / "data.npz", **arrays)
    args = f"{OPTIONS} --data {tmp_path / 'data.npz'} --runs {tmp_path} --stage1-epochs 6 --stage2-epochs 6"
    assert main([*args.split(), "--max-steps-per-epoch", "9"]) == 0
    said = capsys.readouterr().out
    assert "100 for testing, 30 for validation" in said
    assert "warning" not in said
    lines = [json.loads(line) for line in (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()]
    epoch, result = lines[-2:]
    assert (epoch["split"], result["split"]) == ("validation", "test")
    assert epoch["accuracy"]["overall"] > 0.5
    assert result["accuracy"]["overall"] < 0.4


def test_without_a_validation_split_epochs_use_the_test_split_with_a_warning(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OPTIONS.split(), "--data", str(image_file), "--runs", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "warning: no validation split, so epochs are evaluated on the test samples" in said
    assert "test accuracy" in said


def test_the_fingerprint_depends_on_the_validation_split(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays, x_val=arrays["x_train"][:9], y_val=arrays["y_train"][:9])
    data = load_arrays(str(tmp_path / "data.npz"))
    assert data.x_val is not None
    other = dataclasses.replace(data, x_val=data.x_val.flip(0))
    none = dataclasses.replace(data, x_val=None, y_val=None)
    assert len({data.fingerprint(), other.fingerprint(), none.fingerprint()}) == 3


@pytest.mark.parametrize("kind", ["folders", "lists"])
def test_a_validation_split_is_found_by_its_name(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 3, "test": 2, "val": 1})
    source = tmp_path
    if kind == "lists":
        for part in ("train", "test", "val"):
            files = sorted((tmp_path / part).rglob("*.png"))
            lines = [f"{file.relative_to(tmp_path)} {int(file.parent.name == 'bee')}\n" for file in files]
            (tmp_path / f"Set_{part}.txt").write_text("".join(lines))
        source = tmp_path / "Set_train.txt"
    data = load(DataConfig(data=str(source), image_size=8, cache=str(tmp_path / "cache")))
    assert data.x_val is not None
    assert data.y_val is not None
    assert [x[0, 0, 0, 0].item() for x in (data.x_train, data.x_test, data.x_val)] == [0, 60, 120]
    assert torch.bincount(data.y_val).tolist() == [1, 1]
    assert data.eval_split[0] == "validation"


def test_val_without_test_is_the_test_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 3, "val": 2, "held-out": 1})
    cache = str(tmp_path / "cache")
    data = load(DataConfig(data=str(tmp_path), image_size=8, cache=cache))
    assert data.x_test[0, 0, 0, 0] == 60
    assert data.x_val is None
    named = load(
        DataConfig(data=str(tmp_path), val_data=str(tmp_path / "held-out"), image_size=8, cache=cache)
    )
    assert named.x_val is not None
    assert named.x_val[0, 0, 0, 0] == 120


def test_the_doctor_finds_images_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, {"train": 3, "test": 2})
    args = f"--recipe smoke --data {tmp_path} --val-data {tmp_path / 'test'} --cache {tmp_path / 'cache'}"
    assert main(["doctor", *args.split(), "--num-classes", "2"]) == 1
    said = capsys.readouterr().out
    assert "validation: 4 samples" in said
    assert "problem: 4 images are in the test and the validation list" in said
