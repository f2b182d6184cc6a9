"""Loading of the dataset that `--data` names."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
from torch import Tensor

from ..config import DataConfig
from ..console import counted
from .cache import cache_folder
from .dataset import Dataset, Splits, make_dataset, read_only_tensor
from .errors import DataError
from .glyphs.dataset import NAME as GLYPHS
from .glyphs.dataset import load_glyphs
from .hold_out import TOO_FEW, hold_out, hold_out_validation
from .longtail import long_tailed
from .sources.arrays import EMBEDDED, from_arrays, load_arrays
from .sources.cifar import read_cifar
from .sources.decode import load_images
from .sources.listing import Listing, read_listing
from .sources.splits import describe_missing_test, find_splits

NAMED = (*EMBEDDED, GLYPHS)  # datasets that have a name instead of a path
ARCHIVES = (".tar.gz", ".tgz", ".tar")
ARRAYS = (".npz", ".safetensors")
LISTS = (".txt", ".csv", ".json")


def load(config: DataConfig) -> Dataset:
    """Load and check the dataset, and make it long-tailed if an imbalance ratio is given.

    Raises:
        DataError: the data cannot be used. The message names the option, file or array.
    """
    path = Path(config.data)
    check_data(config)
    if config.data == GLYPHS:
        data = _load_glyphs(config)
    elif config.data in EMBEDDED or path.suffix in ARRAYS:
        data = load_arrays(config.data, config.num_classes)
    elif config.data.endswith(ARCHIVES):
        data = from_arrays(path, read_cifar(path), config.num_classes)
    else:
        data = _load_image_files(config)
    if config.imbalance_ratio != 1:
        data = long_tailed(data, config.imbalance_ratio)
    if not is_list(config.data):  # the files of lists are held out before they are decoded
        data = _hold_out_validation(data, config)
    return data


def check_data(config: DataConfig) -> None:
    """Check that `--data` is the name of a dataset or a path of a known kind, and the options of lists.

    Raises:
        DataError: `--data` is neither, or options of lists and folders of image files are given with arrays, an archive or a
            named dataset, which would ignore them.
    """
    data = config.data
    if data not in NAMED and not Path(data).exists():
        expected = (
            "an existing file" if Path(data).suffix else f"an existing folder or file, or {', '.join(NAMED)}"
        )
        raise DataError(f"{data}: expected {expected}, got none: the path does not exist")
    if is_list(data):
        return
    if data not in NAMED and Path(data).suffix not in ARRAYS and not data.endswith(ARCHIVES):
        raise DataError(
            f"{data}: expected a file of arrays named .npz or .safetensors, CIFAR's archive, a list named "
            f".txt, .csv or .json, a folder of class folders, or {', '.join(NAMED)}"
        )
    for name in ("test_data", "val_data", "images", "path_prefixes"):
        if given := getattr(config, name):
            got = given if isinstance(given, str) else " ".join(given)
            expected = "none unless --data is a list or a folder of images"
            raise DataError(f"--{name.replace('_', '-')}: expected {expected}, got {got} with {data}")


def is_list(data: str) -> bool:
    """Return whether `--data` names a list of image files or a folder of them. A named dataset precedes a folder."""
    return data not in NAMED and (Path(data).is_dir() or Path(data).suffix in LISTS)


def read_listings(config: DataConfig) -> dict[str, Listing]:
    """Read the lists of image files of all splits: "train", "test" and possibly "val".

    A list that is not given is found by its name beside the training list.

    Raises:
        DataError: a list is missing or cannot be read.
    """
    test, val = config.test_data, config.val_data
    check_images_folder(config)
    splits = find_splits(Path(config.data))
    train = str(splits.get("train", config.data))
    if not test:
        found = [str(splits[split]) for split in ("test", "val") if split in splits]
        if not found and not config.hold_out:
            raise DataError(describe_missing_test(Path(config.data), splits))
        test = found[0] if found else ""
        val = val or (found[1] if len(found) > 1 else "")
    trained = read_listing(train, config.images, config.path_prefixes)
    lists = {"train": trained} | {
        split: _read_other(config, split, source, trained)
        for split, source in {"test": test, "val": val}.items()
        if source
    }
    parts = {"--hold-out": config.hold_out, "--hold-out-val": config.hold_out_val}
    for option, fraction in parts.items():
        if fraction:
            split = "val" if "test" in lists else "test"
            if split in lists:
                source = val or "--hold-out"
                raise DataError(
                    f"{option}: expected no {split} samples to hold out for, got those of {source}"
                )
            lists["train"], lists[split] = hold_out(lists["train"], fraction, config.hold_out_seed)
            if not lists[split].files:
                raise DataError(f"{option}: {TOO_FEW}")
    return {split: lists[split] for split in ("train", "test", "val") if split in lists}


def _hold_out_validation(data: Dataset, config: DataConfig) -> Dataset:
    """Return the dataset, which has a test split, with the validation split that one of the options makes."""
    if config.hold_out and config.hold_out_val:
        expected = "0 with --hold-out, which makes the validation samples here: --data has test samples"
        raise DataError(f"--hold-out-val: expected {expected}, got {config.hold_out_val}")
    option, fraction = (
        ("--hold-out-val", config.hold_out_val) if config.hold_out_val else ("--hold-out", config.hold_out)
    )
    return hold_out_validation(data, fraction, config.hold_out_seed, option) if fraction else data


def check_images_folder(config: DataConfig) -> None:
    """Check that the folder of --images exists.

    Raises:
        DataError: it does not.
    """
    if config.images and not Path(config.images).is_dir():
        raise DataError(f"--images: expected an existing folder, got {config.images}")


def _read_other(config: DataConfig, split: str, source: str, trained: Listing) -> Listing:
    """Read the list of test or validation images. An error names the option that gives the list."""
    try:
        return read_listing(source, config.images, config.path_prefixes, trained)
    except DataError as error:
        given = {"test": config.test_data, "val": config.val_data}[split]
        if not given or str(error).startswith("--"):
            raise
        raise DataError(f"--{split}-data: {error}") from None


def _load_image_files(config: DataConfig) -> Dataset:
    splits: Splits = {}
    notes: list[str] = []
    lists = read_listings(config)
    for split, listing in lists.items():
        images, labels, left_out = load_split(config, split, listing)
        splits[split] = images, labels
        notes += left_out
    classes = lists["train"].classes
    data = make_dataset(splits, classes.names, config.num_classes, classes.keys)
    return dataclasses.replace(data, notes=(*notes, *data.notes))


def load_split(
    config: DataConfig, split: str, listing: Listing, workers: int | None = None
) -> tuple[Tensor, np.ndarray, list[str]]:
    """Load the images of a list. Return them, their labels, and notes on what was left out.

    Args:
        config: the options of the dataset.
        split: the name of the split in messages.
        listing: the list.
        workers: the number of processes that decode; one per processor if None.

    Raises:
        DataError: images or folders cannot be read, and unreadable files stop the run; or there are no images.
    """
    notes = _check_left_out(config, split, listing)
    images, rows, errors = load_images(listing, config.image_size, cache_folder(config.cache), workers)
    labels = np.array(listing.labels)[rows]
    if errors:
        unreadable = (
            f"{len(errors):,} of {counted(len(listing), 'image')} of the {split} split that cannot be read: "
        )
        unreadable += "; ".join(errors[:5]) + ("; …" if len(errors) > 5 else "")
        if config.unreadable == "stop":
            raise DataError(
                f"{config.data}: expected readable images, got {unreadable} (--unreadable skip leaves them out)"
            )
        warnings.warn(f"left out {unreadable}", RuntimeWarning, stacklevel=2)
    if not len(labels):
        raise DataError(f"{config.data}: expected at least one readable image of the {split} split, got none")
    return images, labels, notes


def _check_left_out(config: DataConfig, split: str, listing: Listing) -> list[str]:
    """Return notes on what a folder's list leaves out, and warn about what is probably a mistake.

    Raises:
        DataError: a folder cannot be read, and unreadable files stop the run.
    """
    notes = []
    for left_out in listing.left_out:
        words = f"left out of the {split} split: {left_out}"
        if left_out.kind == "note":
            notes.append(words)
        elif left_out.kind == "unreadable" and config.unreadable == "stop":
            expected = f"folders of the {split} split that can be read"
            raise DataError(
                f"{config.data}: expected {expected}, got {left_out} (--unreadable skip leaves them out)"
            )
        else:
            warnings.warn(words, RuntimeWarning, stacklevel=2)
    return notes


def _load_glyphs(config: DataConfig) -> Dataset:
    glyphs = load_glyphs(config.image_size, cache_folder(config.cache))
    tensors = {name: read_only_tensor(array) for name, array in glyphs.arrays.items()}
    splits: Splits = {
        split: (tensors[f"x_{split}"], tensors[f"y_{split}"]) for split in ("train", "test", "val")
    }
    data = make_dataset(splits, glyphs.characters, config.num_classes)
    return dataclasses.replace(data, notes=glyphs.notes)
