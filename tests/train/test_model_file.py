"""Tests of the commands that read a model file: every fault of it is an error in one line that names the option."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from train.__main__ import main
from train.data.dataset import Dataset
from train.model.model import read_model_file

from .conftest import REPOSITORY, write_image
from .short_runs import FEATURES, IMAGES
from .test_classifier import save_trained

Words = Callable[[Path], list[str]]


@pytest.fixture
def commands(image_file: Path, tmp_path: Path) -> dict[str, Words]:
    """The words of each command that reads a model, by the option that names the model."""
    out, data = str(tmp_path / "written.safetensors"), str(image_file)
    options = f"--recipe smoke --data {data} --num-classes 5 --device cpu --out {out}".split()
    return {
        "predict": lambda model: ["predict", str(model), "bird.jpg", "--device", "cpu", "--out", out],
        "export": lambda model: ["export", str(model), "--format", "torch-export", "--out", out],
        "evaluate": lambda model: ["evaluate", str(model), "--data", data, "--device", "cpu", "--out", out],
        "features": lambda model: ["features", *options, "--weights", str(model)],
    }


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a command, which is one line, and check that the command writes nothing."""
    capsys.readouterr()
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert not Path(words[words.index("--out") + 1]).exists()
    (line,) = shown.err.splitlines()
    return line


def test_faults_of_a_model_file(
    images: Dataset, commands: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save_trained(IMAGES, images, tmp_path / "run" / "model-gist.safetensors")
    description, state = read_model_file(whole)

    def write(name: str, state: dict[str, torch.Tensor], text: str | None) -> Path:
        safetensors.torch.save_file(state, tmp_path / name, text and {"train": text})
        return tmp_path / name

    def described(**changes: Any) -> str:
        return json.dumps(description | changes)

    (truncated := tmp_path / "truncated").write_bytes(whole.read_bytes()[:-100])
    (empty := tmp_path / "empty").touch()
    fewer = {name: tensor for name, tensor in state.items() if name != "backbone.stem.0.weight"}
    fewer.pop(next(name for name in fewer if name.startswith("backbone.")))
    cases = {
        tmp_path / "missing": "No such file",
        tmp_path / "run": "the folder .*/run, with model-gist.safetensors",
        tmp_path: "with no model",
        truncated: "which is damaged or another file",
        empty: "which is damaged or another file",
        write("other", state, None): "which no run has written",
        write("text", state, "{"): "whose description is damaged",
        write("list", state, "[1]"): "whose description is a list",
        write("tensors", fewer, described()): r"of another version \(RuntimeError",
        write("network", state, described(backbone="vgg")): r"of another version \(KeyError: 'vgg'",
    }
    for command, words in commands.items():
        option = "--weights" if command == "features" else "--model"
        for path, reason in cases.items():
            line = refused(words(path), capsys)
            assert line.startswith(f"error: {option}: expected a trained model, runs/<name>/model-"), line
            assert str(path) in line
            assert re.search(reason, line), line


def test_a_model_of_an_earlier_version(
    images: Dataset, commands: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save_trained(IMAGES, images, tmp_path / "model")
    description, state = read_model_file(whole)
    names = ("backbone", "classes", "crop_size", "transform", "hidden_features")
    earlier = {name: tensor for name, tensor in state.items() if "random" not in name}
    text = json.dumps({name: description[name] for name in names})
    safetensors.torch.save_file(earlier, tmp_path / "earlier", {"train": text})
    for command in ("predict", "export", "evaluate"):
        line = refused(commands[command](tmp_path / "earlier"), capsys)
        assert "earlier of an earlier version, which does not name its method; train again" in line
    assert main(commands["features"](tmp_path / "earlier")) == 0  # the network is whole


def test_a_model_of_features_has_no_network(
    features: Dataset, commands: dict[str, Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_trained(FEATURES, features, tmp_path / "head")
    for command, option in (("predict", "--model"), ("features", "--weights")):
        line = refused(commands[command](model), capsys)
        assert line == f"error: {option}: expected a model of images, got {model}, a model of features"


def test_images_that_are_not_square(
    arrays: dict[str, np.ndarray],
    commands: dict[str, Words],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train.data.sources.arrays import from_arrays

    narrow = {name: array[:, :, :8] if name.startswith("x") else array for name, array in arrays.items()}
    model = save_trained(IMAGES, from_arrays(tmp_path / "x.npz", narrow), tmp_path / "model")
    line = refused(commands["predict"](model), capsys)
    assert "--model: expected a model of square images, got" in line
    assert line.endswith("a model of images [3, 10, 8]")


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_file_that_should_not_be_written(
    command: str,
    commands: dict[str, Words],
    images: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_trained(IMAGES, images, tmp_path / "model")
    content = model.read_bytes()
    words = commands[command](model)
    for out, error in (
        (model, f"--out: expected another file than the model, got {model}"),
        (tmp_path, f"--out: expected a file, got {tmp_path}, which is a folder"),
        (Path("/dev/full"), "--out: expected a file, got /dev/full, which is a device"),
        (tmp_path / "no" / "x", "--out: expected a file in an existing folder"),
    ):
        words[words.index("--out") + 1] = str(out)
        assert main(words) == 2
        assert error in capsys.readouterr().err
    assert model.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "model"]


def test_ctrl_c_leaves_no_file_and_no_traceback(images: Dataset, tmp_path: Path) -> None:
    """The signal goes to the processes that decode images too, as it does from a terminal."""
    model = save_trained(IMAGES, images, tmp_path / "model")
    picture = str(write_image(tmp_path / "a.png", (1, 2, 3), (700, 700)))
    words = [
        "predict",
        str(model),
        *([picture] * 5000),
        "--out",
        str(tmp_path / "rows.csv"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words, "--device", "cpu"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / ".rows.csv.tmp").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors == "stopped by SIGINT; the same command begins again\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "images.npz", "model"]
