"""TrivialAugment and RandAugment: repeatable, resumable, and refused where they cannot run.

The tests of the transforms skip without torchvision.
"""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch

from train.__main__ import main
from train.checks import problems_of
from train.data.dataset import Dataset
from train.data.stream.augment import NUM_UNIFORMS, Augmentation
from train.data.stream.auto_augment import AutoAugment, DrawFrom, image_seeds
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, check_resuming


def test_numbers_come_from_the_generator_and_no_other_one_moves() -> None:
    generator, before = torch.Generator().manual_seed(5), torch.get_rng_state()
    with DrawFrom(generator):
        drawn = torch.rand(3), torch.randint(100, (2,)), torch.randperm(4)
    assert torch.equal(before, torch.get_rng_state())
    again = torch.Generator().manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(3, generator=again))
    assert torch.equal(drawn[1], torch.randint(100, (2,), generator=again))
    assert torch.equal(drawn[2], torch.randperm(4, generator=again))


def test_seeds_differ_in_every_bit_of_the_numbers() -> None:
    seeds = image_seeds(torch.tensor([[0.0, 0.0], [0.0, 2.0**-24], [2.0**-24, 0.0], [1 - 2.0**-24] * 2]))
    assert seeds == [0, 1, 2**24, 2**48 - 1]


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_each_image_depends_on_its_own_numbers_alone(policy: Any, seed: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images = torch.randint(0, 256, (12, 3, 14, 14), dtype=torch.uint8)
    augment, uniforms = Augmentation(2, True, policy=AutoAugment(policy)), torch.rand(12, NUM_UNIFORMS)
    before = torch.get_rng_state()
    whole = augment(images, uniforms, augment.seeds(uniforms))
    assert torch.equal(before, torch.get_rng_state())
    assert whole.dtype == torch.uint8
    for rows in (slice(0, 5), slice(5, 12)):
        part = augment(images[rows], uniforms[rows], augment.seeds(uniforms[rows]))
        assert torch.equal(part, whole[rows])
    moved = Augmentation(2, True)(images, uniforms)
    assert sum(not torch.equal(a, b) for a, b in zip(moved, whole, strict=True)) > 5
    transform = v2.TrivialAugmentWide() if policy == "trivial" else v2.RandAugment()
    for image, one, expected in zip(moved, image_seeds(uniforms[:, -2:]), whole, strict=True):
        torch.manual_seed(one)  # the library by itself
        assert torch.equal(transform(image), expected)


@pytest.mark.parametrize("options", [{"crop_size": 8, "crop_scale": 0.3}, {"jitter": 0.4}, {}])
@pytest.mark.parametrize("channels", [1, 3])
def test_beside_the_other_augmentations(options: dict[str, Any], channels: int, seed: int) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    images = torch.randint(0, 256, (40, channels, 12, 12), dtype=torch.uint8)
    augment, uniforms = (
        Augmentation(**options, policy=AutoAugment("trivial")),
        torch.rand(40, NUM_UNIFORMS),
    )
    out = augment(images, uniforms, augment.seeds(uniforms))
    assert out.shape == (40, channels, *(options.get("crop_size", 12),) * 2)
    assert out.min() >= 0
    assert out.max() <= 255
    assert out.float().std() > 20


def test_a_resumed_run_goes_on_to_the_same_bits(images: Dataset, seed: int) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    config = IMAGES.replace(auto_augment="trivial", mixup=0.5, stage2_epochs=1)
    check_resuming("gist", config, images, random.Random(seed).randrange(1, 8))
    plain = Trainer("gist", config.replace(auto_augment="none"), images).batches.next()
    augmented = Trainer("gist", config, images).batches.next()
    assert torch.equal(plain[0].y, augmented[0].y)
    assert not torch.equal(plain[0].x, augmented[0].x)


def test_a_run(image_file: Any, tmp_path: Any) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    args = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 4 --runs {tmp_path} --device cpu"
    assert main([*args.split(), "--auto-augment", "rand"]) == 0


def test_features_and_graphs_are_refused(features: Dataset, images: Dataset) -> None:
    config = FEATURES.replace(auto_augment="rand")
    problems = list(map(str, problems_of(config, features)))
    assert any("--auto-augment: expected none for samples" in problem for problem in problems)
    problems = list(map(str, problems_of(IMAGES.replace(auto_augment="rand", cuda_graph=True), images)))
    assert any("--cuda-graph: expected off with --auto-augment" in problem for problem in problems)


def test_a_missing_torchvision_is_named(
    image_file: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    args = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 4 --runs {tmp_path}"
    assert main([*args.split(), "--auto-augment", "trivial"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--auto-augment: expected torchvision for this torch, which `pip install '.[augment]'`" in error
