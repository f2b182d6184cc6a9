"""Training samples that are held out for tests or validation, class by class."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset
from .errors import DataError
from .sources.listing import Listing

TOO_FEW = "expected a class with at least two training samples, got none"


def hold_out(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Split a list into a remaining part and a held-out part, as `held_out` selects the files.

    A file that is listed several times is in one part only.

    Args:
        listing: the list.
        fraction: above 0 and below 1.
        seed: the seed of the choice.
    """
    classes: dict[Path, int] = {}
    for file, label in zip(listing.files, listing.labels, strict=True):
        classes.setdefault(file, label)
    mask = held_out(np.array(list(classes.values()), np.int64), fraction, seed)
    held = {file for file, is_held in zip(classes, mask, strict=True) if is_held}
    return _part(listing, held, False), _part(listing, held, True)


def hold_out_validation(data: Dataset, fraction: float, seed: int, option: str) -> Dataset:
    """Return the dataset with a part of its training samples as the validation split, as `held_out` selects them.

    Args:
        data: the dataset.
        fraction: above 0 and below 1.
        seed: the seed of the choice.
        option: the option that asks for it, for messages.

    Raises:
        DataError: the dataset has validation samples, or no class has a sample to spare.
    """
    if data.x_val is not None:
        raise DataError(f"{option}: expected no validation samples to hold out for, got those of --data")
    held = torch.from_numpy(held_out(data.y_train.numpy(), fraction, seed))
    if not held.any():
        raise DataError(f"{option}: {TOO_FEW}")
    return dataclasses.replace(
        data,
        x_train=data.x_train[~held],
        y_train=data.y_train[~held],
        x_val=data.x_train[held],
        y_val=data.y_train[held],
        train_counts=torch.bincount(data.y_train[~held], minlength=data.num_classes),
    )


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a mask over samples, [n] bool: those that are held out.

    A class with n samples holds round(fraction · n) out, but at least one if n > 1, and keeps at least one. The choice
    depends on the order of the samples and the seed alone.

    Args:
        labels: the classes of the samples, [n].
        fraction: above 0 and below 1.
        seed: the seed of the choice.
    """
    rng = np.random.RandomState(seed)  # the same numbers with every version of NumPy
    mask = np.zeros(len(labels), bool)
    order = np.argsort(labels, kind="stable")
    for candidates in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = min(max(1, round(fraction * len(candidates))), len(candidates) - 1)
        mask[candidates[rng.permutation(len(candidates))[:count]]] = True
    return mask


def _part(listing: Listing, held: set[Path], is_held: bool) -> Listing:
    rows = [row for row, file in enumerate(listing.files) if (file in held) == is_held]
    part = dataclasses.replace(
        listing,
        files=[listing.files[row] for row in rows],
        labels=[listing.labels[row] for row in rows],
    )
    return dataclasses.replace(part, left_out=()) if is_held else part
