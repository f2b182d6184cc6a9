"""Data from whatever `--data` names: arrays, CIFAR's archives, lists and folders of image files, or drawn characters."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch

from ..config import DataConfig
from .cache import cache_folder
from .dataset import Dataset, Splits, make_dataset
from .dataset import read_only_tensor as shared
from .errors import DataError
from .glyphs.dataset import NAME as GLYPHS
from .glyphs.dataset import load_glyphs
from .longtail import long_tailed
from .sources.arrays import EMBEDDED, from_arrays, load_arrays
from .sources.cifar import read_cifar
from .sources.decode import load_images
from .sources.listing import Listing, read_listing

NAMED = (*EMBEDDED, GLYPHS)  # sets that a word asks for
ARCHIVES = (".tar.gz", ".tgz", ".tar")


def load(config: DataConfig) -> Dataset:
    """Read, check, and make long-tailed if asked.

    Raises:
        DataError: something is not as expected; the message names it.
    """
    path = Path(config.data)
    if config.data == GLYPHS:
        data = _drawn(config)
    elif config.data in EMBEDDED or path.suffix in (".npz", ".safetensors"):
        data = load_arrays(config.data, config.num_classes)
    elif config.data.endswith(ARCHIVES):
        data = from_arrays(path, read_cifar(path), config.num_classes)
    elif path.is_dir() or path.suffix in (".txt", ".csv", ".json"):
        data = _from_files(config)
    else:
        names = ", ".join(NAMED)
        raise DataError(
            f"{config.data}: expected arrays in a file named .npz or .safetensors, CIFAR's archive, a list named "
            f".txt, .csv or .json, a folder of class folders, or {names}"
        )
    return data if config.imbalance_ratio == 1 else long_tailed(data, config.imbalance_ratio)


def listings(config: DataConfig) -> dict[str, Listing]:
    """The lists of images: train, test, and val where there is one beside a test list or it is named.

    Raises:
        DataError: one of them is not there, or not as expected.
    """
    train, test, val = config.data, config.test_data, config.val_data
    folder = Path(train)
    if folder.is_dir() and (folder / "train").is_dir():
        train = str(folder / "train")
        beside = {part: folder / part for part in ("test", "val")}
    elif "train" in folder.name:
        before, _, after = folder.name.rpartition("train")
        beside = {part: folder.with_name(f"{before}{part}{after}") for part in ("test", "val")}
    else:
        beside = {}
    there = [str(path) for path in beside.values() if path.exists()]
    if not test:
        if not beside:
            raise DataError(f"--test-data: expected the test images' list, as {train} does not name one")
        if not there:
            names = " or ".join(map(str, beside.values()))
            raise DataError(f"--test-data: expected {names} beside {train}, got neither")
        test = there[0]
        val = val or (there[1] if len(there) > 1 else "")
    trained = read_listing(train, config.images, config.path_prefixes)
    others = {"test": test, "val": val}
    return {"train": trained} | {
        part: read_listing(path, config.images, config.path_prefixes, trained)
        for part, path in others.items()
        if path
    }


def _from_files(config: DataConfig) -> Dataset:
    splits: Splits = {}
    lists = listings(config)
    for split, listing in lists.items():
        images, rows, why = load_images(listing, config.image_size, cache_folder(config.cache))
        labels = torch.tensor(listing.labels)[rows]
        if why:
            said = f"{len(why)} of {len(listing)} images cannot be read: " + "; ".join(why[:5])
            said += "; …" if len(why) > 5 else ""
            if config.unreadable == "stop":
                raise DataError(f"{said} (--unreadable skip leaves them out)")
            warnings.warn(f"left out: {said}", RuntimeWarning, stacklevel=2)
        if not len(labels):
            raise DataError(f"{config.data}: expected some {split} images that can be read, got none")
        splits[split] = images, labels
    return make_dataset(splits, lists["train"].names, config.num_classes)


def _drawn(config: DataConfig) -> Dataset:
    made = load_glyphs(config.image_size, cache_folder(config.cache))
    tensors = {name: shared(array) for name, array in made.arrays.items()}
    splits = {split: (tensors[f"x_{split}"], tensors[f"y_{split}"]) for split in ("train", "test", "val")}
    data = make_dataset(splits, made.characters, config.num_classes)
    return dataclasses.replace(data, notes=made.notes)
