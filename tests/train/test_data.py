"""The embedded data, files of arrays, and the streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from train.data.arrays import EMBEDDED, load_arrays
from train.data.longtail import long_tailed_counts
from train.data.streams import Augmentation, RandomStream


def test_the_embedded_set_is_what_it_says() -> None:
    data = load_arrays("fashion-mnist-lt")
    largest = int(data.train_counts[0])
    assert data.train_counts.tolist() == long_tailed_counts(largest, 10, 100)
    assert largest >= 1000
    assert len(set(torch.bincount(data.y_test).tolist())) == 1
    assert len(data.y_test) >= 2000
    assert data.x_train.dtype == torch.uint8
    assert data.sample_shape == [1, 28, 28]
    folder = EMBEDDED["fashion-mnist-lt"].parent
    assert "MIT" in (folder / "LICENSE").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 5 << 20
    flat = data.x_train.flatten(1)
    assert len(torch.unique(torch.cat([flat, data.x_test.flatten(1)]), dim=0)) > 0.99 * (
        len(flat) + len(data.x_test)
    )


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_both_kinds_of_files(suffix: str, tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = {
        "x_train": random.normal(size=(9, 4)).astype(np.float16),
        "y_train": np.arange(9) % 3,
        "x_test": random.normal(size=(3, 4)).astype(np.float16),
        "y_test": np.arange(3),
    }
    path = tmp_path / f"data.{suffix}"
    np.savez(path, **arrays) if suffix == "npz" else save_file(arrays, path)
    data = load_arrays(str(path))
    assert not data.is_images
    assert torch.equal(data.x_train, torch.from_numpy(arrays["x_train"]).float())
    assert data.train_counts.tolist() == [3, 3, 3]
    before = data.fingerprint()
    arrays["x_train"][0, 0] += 1
    np.savez(tmp_path / "other.npz", **arrays)
    assert load_arrays(str(tmp_path / "other.npz")).fingerprint() != before


def test_the_random_stream_visits_all_before_it_repeats(seed: int) -> None:
    stream = RandomStream(10, torch.Generator().manual_seed(seed))
    drawn = torch.cat([stream.take(count) for count in (3, 9, 8, 20)])
    for cycle in drawn.split(10):
        assert sorted(cycle.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])


def test_augmentation_crops_and_flips(seed: int) -> None:
    """Each image is one of the crops of the padded original or of its mirror image, and all kinds occur."""
    images = torch.randint(1, 255, (200, 3, 8, 8), dtype=torch.uint8)
    out = Augmentation(1, True, torch.Generator().manual_seed(seed))(images)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for n in range(len(images)):
        kinds = [
            (top, left, flipped)
            for top in range(3)
            for left in range(3)
            for flipped in (False, True)
            if torch.equal(out[n], crop(padded[n], top, left, flipped))
        ]
        assert len(kinds) == 1
        seen.add(kinds[0])
    assert len(seen) == 18
    assert Augmentation(0, False, torch.Generator())(images) is images


def crop(image: torch.Tensor, top: int, left: int, flipped: bool) -> torch.Tensor:
    part = image[:, top : top + 8, left : left + 8]
    return part.flip(2) if flipped else part
