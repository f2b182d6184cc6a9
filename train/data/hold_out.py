"""Splits of a list by class: training samples that are held out for tests or validation."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np

from .sources.listing import Listing


def hold_out(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Split a list into a remaining part and a held-out part, class by class.

    A class with n files holds round(fraction · n) out, but at least one if n > 1, and keeps at least one. The choice depends
    on the order of the list and the seed alone. A file that is listed several times is in one part only.

    Args:
        listing: the list.
        fraction: above 0 and below 1.
        seed: the seed of the choice.
    """
    rng = np.random.RandomState(seed)  # the same numbers with every version of NumPy
    files: dict[int, dict[Path, None]] = defaultdict(dict)
    classes: dict[Path, int] = {}
    for file, label in zip(listing.files, listing.labels, strict=True):
        files[classes.setdefault(file, label)][file] = None
    held: set[Path] = set()
    for label in sorted(files):
        candidates = list(files[label])
        count = min(max(1, round(fraction * len(candidates))), len(candidates) - 1)
        held.update(candidates[i] for i in rng.permutation(len(candidates))[:count])
    return _part(listing, held, False), _part(listing, held, True)


def _part(listing: Listing, held: set[Path], is_held: bool) -> Listing:
    rows = [row for row, file in enumerate(listing.files) if (file in held) == is_held]
    part = dataclasses.replace(
        listing,
        files=[listing.files[row] for row in rows],
        labels=[listing.labels[row] for row in rows],
    )
    return dataclasses.replace(part, left_out=()) if is_held else part
