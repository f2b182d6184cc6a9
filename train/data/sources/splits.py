"""The places of a dataset's splits: folders in one folder, or lists side by side, by their customary names."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DataError

#: Customary names of each split, in any case.
NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
SHOWN = 5  # names in messages


def find_splits(source: Path) -> dict[str, Path]:
    """Return the folders of the splits in a folder, or the lists or folders beside a training list or folder.

    Returns:
        "train" -> its place, and the places of "test" and "val" if they exist. "train" is missing if neither the name of the
        source nor a folder in it says which samples are for training.

    Raises:
        DataError: a split has several folders, or there are test or validation folders without one for training.
    """
    if source.is_dir():
        inside = _inside(source)
        if "train" in inside:
            return inside
        if inside and (flat := _without_classes(source)):
            raise DataError(_no_classes(source, flat))
        if inside:
            found = ", ".join(sorted(folder.name for folder in inside.values()))
            raise DataError(f"{source}: expected train/ with a folder per class, got {found} alone")
    return _beside(source)


def describe_missing_test(source: Path, splits: dict[str, Path]) -> str:
    """Return an error for a source without test samples, which says what was found and what is expected."""
    advice = "--hold-out 0.1 holds test samples out of the training samples"
    if "train" in splits:
        train = splits["train"]
        expected = " or ".join(str(train.with_name(name)) for name in _siblings(train.name, ("test", "val")))
        return (
            f"--test-data: expected a list or folder of test images, such as {expected}, got none; {advice}"
        )
    if not source.is_dir():
        name = f"the name of {source} has no 'train' to replace"
        return f"--test-data: expected a list of test images, as {name}, got none; {advice}"
    if flat := _without_classes(source):
        return _no_classes(source, flat)
    folders = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
    found = ", ".join(folders[:SHOWN]) + (", …" if len(folders) > SHOWN else "")
    expected = "train/ and test/ (or val/) with a folder per class"
    if folders:
        advice = "if these are the classes, add --hold-out 0.1, which holds test samples out of each"
    return (
        f"{source}: expected {expected}, got {f'the folders {found}' if folders else 'no folder'}; {advice}"
    )


def _without_classes(folder: Path) -> str:
    """Return the name of a folder of training samples that holds no folders; an empty string if there is none."""
    places = (entry for entry in sorted(folder.iterdir()) if entry.name.lower() in NAMES["train"])
    return next((place.name for place in places if place.is_dir() and not _holds_folders(place)), "")


def _no_classes(folder: Path, train: str) -> str:
    return f"{folder}: expected train/ with a folder per class, got no class folders in {train}/"


def _inside(folder: Path) -> dict[str, Path]:
    """Return the folders of splits in a folder. A folder of images alone is a class, whatever its name."""
    found: dict[str, list[Path]] = {split: [] for split in NAMES}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: expected a folder that can be read, got {error.strerror}") from None
    for entry in entries:
        for split, names in NAMES.items():
            if entry.name.lower() in names and entry.is_dir() and _holds_folders(entry):
                found[split].append(entry)
    for split, places in found.items():
        if len(places) > 1:
            got = ", ".join(place.name for place in places)
            raise DataError(f"{folder}: expected one folder of {split} samples, got {got}")
    return {split: places[0] for split, places in found.items() if places}


def _holds_folders(folder: Path) -> bool:
    """Return whether a folder holds folders; True if the folder cannot be read, which its reader reports."""
    try:
        return any(entry.is_dir() for entry in folder.iterdir())
    except OSError:
        return True


def _beside(source: Path) -> dict[str, Path]:
    """Return the source as the training split, and its siblings whose names have another split in place of train."""
    if not _siblings(source.name, ("test",)):
        return {}
    found = {"train": source}
    for split in ("test", "val"):
        names = _siblings(source.name, NAMES[split])
        places = [place for name in names if (place := source.with_name(name)).exists()]
        if places or (places := _in_any_case(source.absolute().parent, names)):
            found[split] = places[0]
    return found


def _in_any_case(folder: Path, names: list[str]) -> list[Path]:
    lower = [name.lower() for name in names]
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name.lower() in lower)
    except OSError:
        return []


def _siblings(name: str, words: tuple[str, ...]) -> list[str]:
    """Return the name with each word in place of the last train or training, in the same case; empty if it has neither."""
    matches = list(re.finditer("train(?:ing)?", name, re.IGNORECASE))
    if not matches:
        return []
    last = matches[-1]
    case = str.upper if last[0].isupper() else str.title if last[0].istitle() else str.lower
    return [f"{name[: last.start()]}{case(word)}{name[last.end() :]}" for word in words]
