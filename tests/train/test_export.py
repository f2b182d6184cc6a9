"""Tests of the command `export`: the files give the model's logits, and hold its description."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from gistops.nn import ConstellationClassifier
from train.__main__ import main
from train.data.dataset import Dataset
from train.model.model import load_model
from train.model.prototypes import prototypes

from .conftest import REPOSITORY, write_image
from .short_runs import FEATURES, IMAGES
from .test_classifier import save_trained


@pytest.fixture
def model_file(images: Dataset, tmp_path: Path) -> Path:
    return save_trained(IMAGES, images, tmp_path / "runs" / "birds" / "model-gist.safetensors")


def description_of(kind: str, path: Path) -> dict[str, Any]:
    """Return the metadata of an exported file, read as the documentation says."""
    if kind == "onnx":
        import onnxruntime

        text = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map["train"]
    elif kind == "safetensors":
        with safetensors.safe_open(path, "pt") as file:
            text = file.metadata()["train"]
    else:
        extra = {"train": ""}
        with open(path, "rb") as opened:
            torch.export.load(opened, extra_files=extra)
        text = extra["train"]
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "safetensors"])
def test_an_exported_file_has_the_description(
    kind: str, model_file: Path, images: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert main(["export", str(model_file), "--format", kind, "--out", str(out)]) == 0
    description = description_of(kind, out)
    assert description["classes"] == train.load(model_file).classes
    assert description["class_labels"] == list(images.class_labels)
    assert description["shot_groups"] == ["many", "medium", "medium", "few", "few"]
    mean, std = (x.flatten().tolist() for x in images.mean_std())
    expected = {"image_size": [10, 10], "channels": "RGB", "crop_size": 0, "mean": mean, "std": std}
    assert description["preprocessing"].items() >= expected.items()
    assert description["preprocessing"]["crops_and_normalizes_itself"] == (kind != "safetensors")


def test_a_model_of_features_is_exported(features: Dataset, tmp_path: Path) -> None:
    file, out = save_trained(FEATURES, features, tmp_path / "model"), tmp_path / "exported"
    assert main(["export", str(file), "--format", "torch-export", "--out", str(out)]) == 0
    with open(out, "rb") as opened, torch.no_grad():
        logits = torch.export.load(opened).module()(features.x_test)
    torch.testing.assert_close(logits, load_model(file)[0](features.x_test).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", ["translation", "rotation", "mlp", None])
def test_prototypes_give_the_logits(transform: Any, seed: int) -> None:
    torch.manual_seed(seed)
    options = {"transform": transform} if transform else {}
    head = ConstellationClassifier(12, 33, 3 if transform else 0, **options, backend="reference").double()
    x = torch.randn(9, 12, dtype=torch.float64)
    vectors = prototypes(head)
    assert vectors.shape == (33, 4 if transform else 1, 12)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(vectors.shape[:2], dtype=torch.float64))
    logits = head.tau * torch.einsum("bd,kjd->bkj", F.normalize(x, dim=1), vectors).amax(2)
    torch.testing.assert_close(logits, head(x))


@pytest.mark.parametrize("method", ["plain", "oltr", "cos-balanced-softmax", "gist-rotation", "gist-mlp"])
def test_weights_of_every_head(method: str, features: Dataset, tmp_path: Path) -> None:
    file, out = save_trained(FEATURES, features, tmp_path / "model", method), tmp_path / "weights"
    assert (
        main(["export", str(file), "--format", "safetensors", "--out", str(out)]) == 0
    )  # it compares the logits
    names = {name for name in load_file(out) if name.startswith("head.")}
    heads = {"plain": {"head.weight", "head.bias"}, "oltr": {"head.centroids"}}
    assert names >= heads.get(method, {"head.prototypes", "head.tau"})


def blocks() -> list[str]:
    """Return the Python blocks of the documentation of `export`."""
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"### Export\n(.*?)\n### ", text, re.DOTALL)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_block_of_the_documentation_runs_onnx(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "bird.jpg", (200, 30, 90), (40, 25))
    assert main(["export", str(model_file), "--out", "birds.onnx"]) == 0
    found: dict[str, Any] = {}
    exec(blocks()[0], found)
    expected = train.load(model_file).predict("bird.jpg", k=5)
    logits = torch.from_numpy(found["logits"])
    best = logits.softmax(1).topk(5)
    torch.testing.assert_close(best.values, expected.probabilities, atol=1e-3, rtol=1e-2)
    assert found["name"] == expected.classes[0][0]


def test_the_block_of_the_documentation_reads_weights(
    features: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = blocks()
    file = save_trained(FEATURES, features, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(file), "--format", "safetensors", "--out", "head.safetensors"]) == 0
    found: dict[str, Any] = {"features": features.x_test}
    exec(code, found)
    with torch.no_grad():
        torch.testing.assert_close(
            found["logits"], load_model(file)[0](features.x_test), atol=1e-4, rtol=1e-4
        )
    assert found["about"]["classes"] == features.class_names


def test_an_export_is_no_model_file(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    assert main(["export", str(model_file), "--format", "safetensors", "--out", str(out)]) == 0
    assert main(["predict", str(out), "bird.png"]) == 2
    assert "which is an export; use the model file that it was made from" in capsys.readouterr().err
