"""A trained run on images whose classes have nasty names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.__main__ import main

from ..conftest import COUNTS, labels

NAMES = (
    "</script><b>bold</b><!--",
    "a \"quoted\" 'name', {{ 1 + 1 }} & more",
    "two\nlines \x1b[31m \x00 \ufffe \u202e reversed",
    "美洲豹 🦊 ببر",
    "x" * 300,
)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two methods. Nothing is learned, so few-shot classes are confused with others."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"classes": np.array(NAMES)}
    for part, counts in (("train", COUNTS), ("test", (20,) * len(COUNTS))):
        arrays[f"y_{part}"] = labels(counts, rng)
        arrays[f"x_{part}"] = rng.integers(0, 256, (sum(counts), 130, 10, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", **arrays)
    options = "--backbone resnet8-half --stage1-epochs 1 --stage2-epochs 1 --classes-per-batch 3 --batch-size 50 --max-steps-per-epoch 1"
    files = f"--recipe smoke --data {folder / 'images.npz'} --num-classes 5 --runs {folder} --device cpu"
    assert main([*f"{files} {options}".split(), "--name", "<nasty> & run"]) == 0
    return folder / "<nasty> & run"
