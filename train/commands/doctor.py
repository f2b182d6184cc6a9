"""`python -m train doctor`: looks at the data of a run before the run does, and says in words what is wrong with it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from dataclasses import dataclass, field

import torch
from rich.console import Console

from ..config import CenteringConfig, ConfigError, DataConfig, RecipeConfig
from ..console import say
from ..data.dataset import Dataset
from ..data.errors import DataError
from ..data.load import is_list, load, read_listings
from ..options import Sections
from ..shot_groups import SPLIT_RULES, split_classes

SHOWN = 10  # of each kind of trouble
SPLITS = {"train": "training", "test": "test", "val": "validation"}


@dataclass(frozen=True, kw_only=True)
class Doctor(Sections):
    """Examines the data of a run and lists the problems."""

    run: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: CenteringConfig = field(default_factory=CenteringConfig)


def examine(config: Doctor, console: Console) -> int:
    """Print what was found; returns 0 if nothing is wrong, otherwise 1.

    Raises:
        ConfigError: the data cannot be read at all.
    """
    troubles = _missing_files(config)
    source = dataclasses.replace(config.data, unreadable="skip")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load(source)
    except DataError as error:
        for trouble in troubles:
            say(console, f"problem: {trouble}")
        raise ConfigError("data", "a data set", str(error)) from None
    troubles += [str(warning.message) for warning in caught] + _odd(data, config)
    for line in describe(data, config):
        say(console, line)
    for trouble in troubles:
        say(console, f"problem: {trouble}")
    say(console, f"{len(troubles)} problems" if troubles else "nothing is wrong with it")
    return 1 if troubles else 0


def describe(data: Dataset, config: Doctor) -> list[str]:
    """Sizes, counts, and what each rule makes of them."""
    counts = data.train_counts
    largest, smallest = int(counts.max()), int(counts.min())
    lines = [
        f"{config.data.data}: {data.num_classes} classes, samples {data.sample_shape}",
        f"training: {len(data.y_train):,} samples, {largest:,} to {smallest:,} a class (ratio {largest / smallest:.0f}), "
        f"median {float(counts.double().median()):.0f}",
        f"test: {len(data.y_test):,} samples",
        *data.notes,
    ]
    validation = "none: epochs are evaluated on the test samples"
    if data.y_val is not None:
        validation = f"{len(data.y_val):,} samples"
    lines.append(f"validation: {validation}")
    for rule in SPLIT_RULES:
        sizes = (f"{int(mask.sum())} {group}" for group, mask in split_classes(counts, rule).items())
        lines.append(f"groups, {rule}: {', '.join(sizes)}")
    return lines


def _missing_files(config: Doctor) -> list[str]:
    """Files of lists that are not there, a layout that does not fit, and images in both lists."""
    if not is_list(config.data.data):
        return []
    try:
        lists = read_listings(config.data)
    except DataError:
        return []  # said by load()
    troubles = []
    for part, listing in ((SPLITS[name], listing) for name, listing in lists.items()):
        missing = [file for file in listing.files if not file.is_file()]
        if missing:
            some = _some(list(map(str, missing)))
            advice = ""
            if len(missing) == len(listing):
                advice = "; none is there: see --images, where paths begin, and --path-prefixes OLD=NEW"
            troubles.append(f"{len(missing)} of {len(listing)} {part} images are not there: {some}{advice}")
        if twice := len(listing) - len(set(listing.files)):
            troubles.append(f"{twice} {part} images are listed more than once")
    for one, other in itertools.combinations(lists, 2):
        if both := sorted(set(lists[one].files) & set(lists[other].files)):
            some = _some(list(map(str, both)))
            troubles.append(
                f"{len(both)} images are in the {SPLITS[one]} and the {SPLITS[other]} list: {some}"
            )
    return troubles


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _odd(data: Dataset, config: Doctor) -> list[str]:
    troubles = []
    tested = torch.bincount(data.y_test, minlength=data.num_classes)
    if untested := (tested == 0).nonzero().flatten().tolist():
        names = _some([data.class_names[k] for k in untested])
        troubles.append(f"{len(untested)} classes have no test sample: {names}")
    if data.is_images:
        flat = data.x_train[:2000].flatten(1)
        blank = int((flat == flat[:, :1]).all(1).sum())
        if blank:
            troubles.append(f"{blank} of the first {len(flat)} training images are of one colour")
    else:
        if zero := int((data.x_train == 0).all(1).sum()):
            troubles.append(f"{zero} training features are all zero")
        shared = data.x_train.mean(0).norm() > 0.5 * data.x_train.norm(dim=1).mean()
        if shared and not config.model.center_features:
            troubles.append(
                "the features share one direction (their mean is over half as long as they are), which keeps "
                "displacements from being used: --center-features takes it away"
            )
    return troubles
