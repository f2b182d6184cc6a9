"""Augmentation of images: crops, flips and color jitter, and runs with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from train.__main__ import main
from train.data.stream.augment import NUM_UNIFORMS, Augmentation
from train.model.model import Normalize


def augmented(images: torch.Tensor, **options: Any) -> torch.Tensor:
    return Augmentation(**options)(images, torch.rand(len(images), NUM_UNIFORMS))


def ramp(b: int, h: int, w: int) -> torch.Tensor:
    """Return b images whose red channel is twice the column and whose green channel is twice the row."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    one = torch.stack([2 * columns, 2 * rows, torch.zeros_like(rows)])
    return one.to(torch.uint8).expand(b, -1, -1, -1).contiguous()


def test_augmentation_against_one_image_at_a_time(seed: int) -> None:
    images = torch.randint(0, 256, (64, 3, 9, 7), dtype=torch.uint8)
    out = Augmentation(2, True)(images, torch.rand(len(images), NUM_UNIFORMS))
    assert out.shape == images.shape
    padded = F.pad(images, (2, 2, 2, 2))
    crops = {
        (top, left): padded[:, :, top : top + 9, left : left + 7] for top in range(5) for left in range(5)
    }
    candidates = {(*place, flip): x.flip(3) if flip else x for place, x in crops.items() for flip in (0, 1)}
    places = []
    for i in range(len(images)):
        found = [place for place, candidate in candidates.items() if torch.equal(candidate[i], out[i])]
        assert len(found) == 1  # the images are noise: no two crops look the same
        places += found
    assert len({place[:2] for place in places}) > 10
    assert {place[2] for place in places} == {0, 1}
    assert Augmentation()(images, torch.rand(len(images), NUM_UNIFORMS)) is images


def test_random_resized_crops_are_boxes_of_the_image(seed: int) -> None:
    images = ramp(400, 60, 80)
    out = augmented(images, crop_size=24, crop_scale=0.2)
    assert out.shape == (400, 3, 24, 24)
    column, row = out[:, 0] / 2, out[:, 1] / 2
    inner = slice(4, 20)  # the sampling reflects at the image's edge
    assert (column[:, inner, inner].diff(dim=2) > 0).all()
    assert (row[:, inner, inner].diff(dim=1) > 0).all()
    assert column[:, inner, inner].diff(dim=1).abs().max() < 0.02, "not upright"
    width = 24 * column[:, 12, inner].diff(dim=1).mean(1)
    height = 24 * row[:, inner, 12].diff(dim=1).mean(1)
    assert width.max() <= 80.5
    assert height.max() <= 60.5
    area = width * height / (60 * 80)
    assert 0.15 < area.min() < 0.3
    assert area.max() > 0.8
    ratio = (width / height)[area < 0.5]  # larger boxes may be cut to the image
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    middle = column[:, 12, 12]
    assert middle.std() > 7  # 8.6 ± 0.3 over seeds
    assert column.min() >= 0
    assert column.max() <= 79.01


def test_resized_crops_flip_half_of_the_images(seed: int) -> None:
    out = augmented(ramp(400, 60, 60), flip=True, crop_size=24, crop_scale=0.5)
    flipped = (out[:, 0, 12, 18] < out[:, 0, 12, 6]).float().mean()
    assert 0.35 < flipped < 0.65
    assert (out[:, 1, 18, 12] > out[:, 1, 6, 12]).all()


def test_crops_without_resizing(seed: int) -> None:
    images = ramp(200, 30, 30)
    out = augmented(images, crop_size=20)
    assert out.shape == (200, 3, 20, 20)
    assert out.dtype == torch.uint8
    left, top = out[:, 0, 0, 0].long() // 2, out[:, 1, 0, 0].long() // 2
    assert sorted(left.unique().tolist()) == list(range(11))
    for image, x, y in zip(out, left, top, strict=True):
        assert torch.equal(image, images[0, :, y : y + 20, x : x + 20])


def test_jitter_changes_brightness_contrast_and_saturation(seed: int) -> None:
    gray = torch.full((300, 3, 4, 4), 100, dtype=torch.uint8)
    out = augmented(gray, jitter=0.4)
    assert out.std((2, 3)).max() < 1e-3  # contrast and saturation do not change uniform gray images
    level = out[:, 0, 0, 0]
    assert 59 < level.min() < 70
    assert 130 < level.max() < 141
    colored = torch.randint(60, 160, (300, 3, 8, 8), dtype=torch.uint8)
    out = augmented(colored, jitter=0.4)
    spread = out.std((1, 2, 3)) / colored.float().std((1, 2, 3))
    assert spread.max() > 1.1
    assert spread.min() < 0.8
    assert out.min() >= 0
    assert out.max() <= 255
    single = augmented(gray[:, :1], jitter=0.4)
    assert single.shape == (300, 1, 4, 4)


@pytest.mark.parametrize(
    "options",
    [{"crop_padding": 2, "flip": True}, {"crop_size": 8, "crop_scale": 0.3, "jitter": 0.4, "flip": True}],
)
def test_the_random_numbers_alone_decide_each_image(options: dict[str, Any], seed: int) -> None:
    images = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)
    augment, uniforms = Augmentation(**options), torch.rand(5, NUM_UNIFORMS)
    whole = augment(images, uniforms)
    assert torch.equal(augment(images, uniforms), whole)
    assert not torch.equal(augment(images, uniforms.flip(0)), whole)
    parts = [augment(images[rows], uniforms[rows]) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-3, rtol=0)


def test_evaluation_crops_the_center() -> None:
    images = ramp(1, 31, 40)
    seen = Normalize(torch.zeros(3), torch.ones(3), 20)(images) * 255
    assert seen.shape == (1, 3, 20, 20)
    assert torch.equal(seen.round().to(torch.uint8), images[:, :, 5:25, 10:30])
    assert Normalize(torch.zeros(3), torch.ones(3), 20)(images[:, :, :20, :20]).shape == (1, 3, 20, 20)


WRONG = [
    ("--crop-size 99", "--crop-size: expected at most the images' side, 28, got 99"),
    ("--crop-scale 1.5", "--crop-scale: expected a fraction"),
    ("--color-jitter 2", "--color-jitter: expected a fraction"),
]


@pytest.mark.parametrize(("args", "words"), WRONG)
def test_invalid_options_are_named(
    args: str, words: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", "smoke", "--runs", str(tmp_path), *args.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_run_with_crops_and_jitter(image_file: Any, tmp_path: Any) -> None:
    args = f"--recipe smoke --data {image_file} --num-classes 5 --classes-per-batch 4 --runs {tmp_path} --device cpu"
    args += (
        " --crop-padding 0 --crop-size 8 --crop-scale 0.3 --color-jitter 0.4 --methods gist-mlp gist-rotation"
    )
    assert main(args.split()) == 0
    from train.model.model import load_model

    for name in ("gist-mlp", "gist-rotation"):
        model, _ = load_model(tmp_path / "smoke" / f"model-{name}.safetensors")
        assert model.head.transform == name.removeprefix("gist-")
        assert model.normalize.crop_size == 8
        assert model(torch.zeros(2, 3, 10, 10, dtype=torch.uint8)).shape == (2, 5)
