"""Networks for images: sizes, timm, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.__main__ import main
from train.model.backbones import BackboneError, make_backbone

from ..timm_networks import import_or_skip


def test_resnet10_has_the_published_size(seed: int) -> None:
    """The published network has ImageNet's stem and basic blocks 1-1-1-1; here it has no classifier."""
    network = make_backbone("resnet10", 3)
    assert sum(p.numel() for p in network.parameters()) == count_by_hand()
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def count_by_hand() -> int:
    total = 3 * 64 * 49 + 2 * 64
    for inside, outside, projected in ((64, 64, False), (64, 128, True), (128, 256, True), (256, 512, True)):
        total += 9 * inside * outside + 9 * outside * outside + 4 * outside
        total += (inside * outside + 2 * outside) if projected else 0
    return total


def test_timm_networks(seed: int) -> None:
    import_or_skip("timm")
    network = make_backbone("timm/resnet18", 3)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, network.out_features)
    with pytest.raises(BackboneError, match="the name of a network"):
        make_backbone("timm/no_such_network", 3)


def test_a_missing_timm_is_named(image_file: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import timm  # noqa: F401

        pytest.skip("timm is installed")
    except (
        ImportError,
        RuntimeError,
    ):  # RuntimeError: torchvision, which timm imports, does not fit this torch
        pass
    args = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 4 --runs {tmp_path} --device cpu"
    assert main([*args.split(), "--backbone", "timm/resnet50"]) == 2
    assert "--backbone: expected timm, which `pip install timm` installs" in capsys.readouterr().err


def test_pretrained_needs_timm(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args = f"--recipe smoke --runs {tmp_path} --pretrained --backbone resnet20"
    assert main(args.split()) == 2
    assert "--pretrained: expected a backbone timm/NAME" in capsys.readouterr().err
