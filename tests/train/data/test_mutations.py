"""Files of data with random damage: they are read, or refused with an error of ours."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from train.config import ConfigError
from train.data.errors import DataError
from train.data.sources.arrays import load_arrays
from train.data.sources.cifar import read_cifar
from train.data.sources.listing import read_listing
from train.recipes import load_recipe

ROUNDS = 150
CSV = 'id,path,label\n1,"a,b.jpg",ant\n2,b.jpg,bee\n3,c.jpg,7\n'
TXT = "a b.jpg 1\nc.jpg 2\nd.jpg -1\n"
TOML = 'lr = 0.1\nbackbone = "resnet20"\nlr_drops = [0.1, 0.5]\n'
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "category_id": 3}, {"image_id": 2, "category_id": 4}],
    "categories": [{"id": 3, "name": "ant"}, {"id": 4, "name": "bee"}],
}


def safetensors_file() -> bytes:
    x, y = torch.arange(54, dtype=torch.uint8).view(6, 3, 3), torch.arange(6)
    tensors = {"x_train": x, "y_train": y, "x_test": x.clone(), "y_test": y.clone()}
    return safetensors.torch.save(tensors, {"classes": json.dumps(list("abcdef"))})


def tar(mode: str) -> bytes:
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}
    files = {"train": batch, "test": batch, "meta": {b"fine_label_names": [b"a", b"b"]}}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, value in files.items():
            raw = pickle.dumps(value, 2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return content.getvalue()


FILES: dict[str, tuple[bytes, Callable[[str], Any]]] = {
    "a.csv": (CSV.encode(), read_listing),
    "a.txt": (TXT.encode(), read_listing),
    "a.json": (json.dumps(COCO).encode(), read_listing),
    "a.toml": (TOML.encode(), load_recipe),
    "a.safetensors": (safetensors_file(), load_arrays),
    "a.tar": (tar("w"), lambda path: read_cifar(Path(path))),
    "a.tar.gz": (tar("w:gz"), lambda path: read_cifar(Path(path))),
}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, insert or remove bytes at one to three places, most of them near the start."""
    for _ in range(rng.integers(1, 4)):
        near = min(len(content), 2000) if rng.random() < 0.7 else len(content)
        start = int(rng.integers(near))
        removed, inserted = rng.integers(0, 9, 2) if rng.random() < 0.5 else (1, 1)
        content = content[:start] + rng.bytes(int(inserted)) + content[start + int(removed) :]
    return content


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_raise_no_other_error(name: str, tmp_path: Path, seed: int) -> None:
    content, read = FILES[name]
    rng = np.random.default_rng(seed)
    (tmp_path / name).write_bytes(content)
    read(str(tmp_path / name))  # the whole file is valid
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # images without an annotation
        for _ in range(ROUNDS):
            (tmp_path / name).write_bytes(damaged(content, rng))
            try:
                read(str(tmp_path / name))
            except (DataError, ConfigError):
                refused += 1
    assert refused > 0
