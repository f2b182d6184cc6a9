"""Tests of `python -m train features`: the features of a trained network, and its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train.__main__ import main
from train.cli import parse
from train.commands.features import Features, load_network
from train.data.dataset import Dataset
from train.data.errors import DataError
from train.data.sources.arrays import load_arrays
from train.evaluation.evaluate import evaluate
from train.model.model import Model, load_model

from .timm_networks import import_or_skip

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SHORT = "--classes-per-batch 3 --stage1-epochs 2 --stage2-epochs 2 --batch-size 50 --device cpu"


@pytest.fixture
def run(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The folder of a run on images/named.npz, with crops that feature extraction must repeat."""
    (tmp_path / "images").mkdir()
    validation = {"x_val": arrays["x_test"][::-3], "y_val": arrays["y_test"][::-3]}
    np.savez(tmp_path / "images" / "named.npz", **arrays, **validation, classes=np.array(NAMES))
    options = (
        f"--recipe smoke --data {tmp_path}/images/named.npz --num-classes 5 --crop-size 8 --runs {tmp_path}"
    )
    assert main([*options.split(), *SHORT.split(), "--name", "r"]) == 0
    return tmp_path / "r"


def extract(run: Path, out: Path, *more: str, method: str = "gist") -> int:
    words = f"features --recipe smoke --data {run.parent}/images/named.npz --num-classes 5 --device cpu --out {out}"
    return main([*words.split(), "--weights", str(run / f"model-{method}.safetensors"), *more])


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_features_are_those_of_the_evaluation(
    method: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.safetensors"
    # The backbone and the crop of the model file take precedence over these options.
    assert extract(run, out, "--backbone", "resnet20", "--crop-size", "5", method=method) == 0
    shown = capsys.readouterr().out
    images = load_arrays(str(run.parent / "images" / "named.npz"))
    model, names = load_model(run / f"model-{method}.safetensors")
    made = load_arrays(str(out))
    assert made.class_names == names == NAMES
    assert not made.is_images
    for part in ("train", "test", "val"):
        x, y = getattr(images, f"x_{part}"), getattr(images, f"y_{part}")
        with torch.no_grad():
            assert torch.equal(getattr(made, f"x_{part}"), model.features(x))
        assert torch.equal(getattr(made, f"y_{part}"), y)
        assert f"{part}: {len(y)} features [128]" in shown
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (result,) = (r for r in records if r["event"] == "result" and r["method"] == method)
    head = Model(nn.Identity(), nn.Identity(), nn.Identity(), model.head, "none")
    found, _ = evaluate(head, made.x_test, made.y_test, made.num_classes)
    assert found.per_class() == result["accuracy_per_class"]


def test_a_run_trains_on_the_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    assert extract(run, out) == 0
    args = f"--recipe features --data {out} --runs {tmp_path} --name head --methods plain {SHORT}"
    assert main(args.split()) == 0
    assert load_model(tmp_path / "head" / "model-plain.safetensors")[1] == NAMES


def test_more_samples_than_one_batch(run: Path, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    many = {name: np.concatenate([array] * 5) for name, array in arrays.items()}
    np.savez(run.parent / "images" / "named.npz", **many)
    out = tmp_path / "features.safetensors"
    assert extract(run, out) == 0
    made = load_arrays(str(out))
    assert len(made.x_train) == 5 * len(arrays["x_train"]) > 1000
    model, _ = load_model(run / "model-gist.safetensors")
    images = load_arrays(str(run.parent / "images" / "named.npz")).x_train
    with torch.no_grad():
        parts = [model.features(part) for part in images.split(500)]
    assert torch.equal(made.x_train, torch.cat(parts))


def test_invalid_options_are_refused(
    run: Path, feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.safetensors"

    def refuses(words: str, *more: str) -> None:
        before = set(tmp_path.iterdir())
        assert extract(run, out, *more) == 2
        message = capsys.readouterr().err
        assert words in message
        assert len(message.strip().splitlines()) == 1
        assert set(tmp_path.iterdir()) == before

    capsys.readouterr()
    refuses("--weights: expected --weights PATH, a run's model, or --backbone timm/NAME", "--weights", "")
    refuses("--weights: expected a trained model, runs/<name>/model-", "--weights", str(tmp_path / "no"))
    refuses("--weights: expected a trained model", "--weights", str(run / "metrics.jsonl"))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    refuses("--weights: expected a trained model", "--weights", str(tmp_path / "other.safetensors"))
    refuses("--pretrained: expected either --weights or", "--pretrained", "--backbone", "timm/resnet10t")
    refuses("--data: expected images, got features [12]", "--data", str(feature_file))
    refuses("--data: nowhere.npz: expected an existing file", "--data", "nowhere.npz")
    refuses("--out: expected a file named .safetensors", "--out", str(tmp_path / "features.npz"))
    refuses("--out: expected a file in an existing folder", "--out", f"{tmp_path}/no/f.safetensors")
    refuses("--out: expected a new file", "--out", str(run / "model-gist.safetensors"))
    fashion = ("--data", "fashion-mnist-lt", "--num-classes", "10")
    refuses("--weights: expected a network for images with 1 channels", *fashion)

    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name head --methods plain {SHORT}"
    assert main(args.split()) == 0
    refuses(
        "expected a model of images, got", "--weights", str(tmp_path / "head" / "model-plain.safetensors")
    )
    small = {"x_train": np.zeros((5, 6, 6, 3), np.uint8), "y_train": np.arange(5)}
    small |= {"x_test": small["x_train"], "y_test": small["y_train"]}
    np.savez(tmp_path / "small.npz", **small)
    refuses("--weights: expected a crop of at most the images' side, 6", "--data", f"{tmp_path}/small.npz")


def test_names_in_a_safetensors_file(feature_arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    tensors = {name: torch.from_numpy(array) for name, array in feature_arrays.items()}
    save_file(tensors, path)
    assert load_arrays(str(path)).class_names == list("01234")
    save_file(tensors, path, {"classes": json.dumps(NAMES)})
    assert load_arrays(str(path)).class_names == NAMES
    save_file(tensors, path, {"classes": json.dumps(NAMES[:3])})
    with pytest.raises(DataError, match="classes: expected 5 names to match y_train, got 3"):
        load_arrays(str(path))
    save_file(tensors, path, {"classes": "ant, bee"})
    with pytest.raises(DataError, match=r"expected a readable \.safetensors file"):
        load_arrays(str(path))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_network_gets_images_normalized_as_in_its_training(
    channels: int, images: Dataset, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm: Any = import_or_skip("timm")
    create, asked = timm.create_model, []

    def without_download(name: str, pretrained: bool, **more: Any) -> nn.Module:
        asked.append(pretrained)
        network: nn.Module = create(name, False, **more)
        return network

    monkeypatch.setattr(timm, "create_model", without_download)
    words = f"--recipe smoke --data {image_file} --backbone timm/resnet18 --pretrained --device cpu"
    data = dataclasses.replace(
        images, **{part: getattr(images, part)[:, :channels] for part in ("x_train", "x_test")}
    )
    model = load_network(parse(words.split(), Features, ""), data)
    assert asked == [True]
    mean, std = model.normalize.mean.flatten(), model.normalize.std.flatten()
    expected = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if channels == 1:
        expected = expected[0].mean()[None], expected[1].mean()[None]
    torch.testing.assert_close((mean, std), expected)
    assert model.eval().features(data.x_test[:2]).shape == (2, 512)
