"""Tests of `python -m bench.training`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.training import PARTS, Parts, main, step
from train.data.dataset import Dataset
from train.training.trainer import Trainer

from ..train.short_runs import IMAGES


def test_a_step_in_parts_trains_as_a_whole_step(images: Dataset) -> None:
    whole, in_parts = (Trainer("gist", IMAGES, images) for _ in range(2))
    parts = Parts(torch.device("cpu"))
    for _ in range(2):
        whole.step()
        step(in_parts, parts)
    for (name, expected), found in zip(
        whole.model.named_parameters(), in_parts.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=lambda said, name=name: f"{name}: {said}")
    assert {part: len(seconds) for part, seconds in parts.seconds.items()} == dict.fromkeys(PARTS, 2)


def test_random_features_for_class_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"counts": [40, 9, 5, 2]}))
    options = f"--recipe features --data {file} --made-up-features 16 --classes-per-batch 3 --batch-size 8 --steps 2"
    assert main([*options.split(), "--backends", "auto", "reference", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "head" in said
    assert "steps/s" in said
    assert main([*options.split(), "--data", str(tmp_path / "none.json")]) == 2
    assert "--data: expected a JSON file with class counts" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--precision=bf16", "--accumulate=2", "--compile", "--batch-norm=split"])
def test_options_that_cannot_be_measured_raise(
    option: str, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 3 --device cpu".split()
    assert main([*args, option]) == 2
    assert f"{option.split('=')[0]}: expected " in capsys.readouterr().err
