from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.dataset import Dataset
from train.data.sources.arrays import load_arrays

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = (
    120,
    60,
    30,
    15,
    7,
)  # training samples a class: 1 many-, 2 medium- and 2 few-shot by the standard rule


def shared_file(name: str) -> Path:
    """Return the path of real data beside the repository, or skip the test if it is not there."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} does not exist; the project does not include this data")
    return path


def labels(counts: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.fixture
def arrays(seed: int) -> dict[str, np.ndarray]:
    """Images 10×10 in which each class has a color, with noise. A few training steps learn them."""
    rng = np.random.default_rng(seed)
    colors = np.linspace(40, 215, len(COUNTS))[:, None] * [1, 0.5, 0] + [0, 60, 120]
    result = {}
    for part, counts in (("train", COUNTS), ("test", (20,) * len(COUNTS))):
        y = labels(counts, rng)
        x = colors[y][:, None, None] + rng.normal(0, 25, (len(y), 10, 10, 3))
        result[f"x_{part}"], result[f"y_{part}"] = x.clip(0, 255).astype(np.uint8), y
    return result


@pytest.fixture
def feature_arrays(seed: int) -> dict[str, np.ndarray]:
    """Features [n, 12] with one cluster per class."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(COUNTS), 12))
    result = {}
    for part, counts in (("train", COUNTS), ("test", (20,) * len(COUNTS))):
        y = labels(counts, rng)
        noise = rng.normal(0, 0.4, (len(y), 12))
        result[f"x_{part}"], result[f"y_{part}"] = (centers[y] + noise).astype(np.float32), y
    return result


@pytest.fixture
def image_file(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def feature_file(feature_arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    path = tmp_path / "features.npz"
    np.savez(path, **feature_arrays)
    return path


@pytest.fixture
def images(image_file: Path) -> Dataset:
    return load_arrays(str(image_file))


@pytest.fixture
def features(feature_file: Path) -> Dataset:
    return load_arrays(str(feature_file))


COLORS = {"ant": (250, 10, 10), "bee": (10, 250, 10), "cat": (10, 10, 250)}
IMAGES_PER_CLASS = {"ant": 4, "bee": 3, "cat": 2}


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with train/<class>/<n>.png and val/<class>/0.jpg."""
    for name, count in IMAGES_PER_CLASS.items():
        for i in range(count):
            write_image(tmp_path / "set" / "train" / name / f"{i}.png", COLORS[name], (40 + i, 30))
        write_image(tmp_path / "set" / "val" / name / "0.jpg", COLORS[name])
    return tmp_path / "set"


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def check_colors(x: torch.Tensor, y: torch.Tensor) -> None:
    """Assert that each image has the color of its label."""
    for image, label in zip(x, y, strict=True):
        expected = torch.tensor(list(COLORS.values())[label]).float()
        assert (image.float().mean((1, 2)) - expected).abs().max() < 12
