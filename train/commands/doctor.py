"""`python -m train doctor`: examines a dataset and the options before a run uses them, and lists their problems."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from dataclasses import dataclass

import torch
from rich.console import Console

from ..checks import problems_of
from ..cli import parse, program
from ..config import Config
from ..console import counted, messages_of, print_json, say
from ..data.dataset import Dataset
from ..data.errors import DataError
from ..data.load import is_list, load, read_listings
from ..options import InvalidData
from ..shot_groups import SPLIT_RULES, split_classes
from ..unused_options import unused_options

SHOWN = 10  # names per problem
SPLITS = {"train": "training", "test": "test", "val": "validation"}


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options of the command beside those of a run."""

    #: Write one JSON object to standard output: the lines of the description and the problems; messages go to standard error.
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Doctor(Config, DoctorOptions):
    """Examines a dataset, and makes every check of a run with the same options, without training. Lists the problems."""


def examine(args: list[str], console: Console) -> int:
    """Print a description of the data and its problems. Return 0 if there are none, otherwise 1.

    Args:
        args: the words of the command line after `doctor`.
        console: where both are written.

    Raises:
        ConfigError: an invalid option, or data that cannot be read.
    """
    config = parse(args, Doctor, program("doctor"), own=DoctorOptions)
    messages = messages_of(console, as_json=config.json)
    problems = _missing_files(config)
    source = dataclasses.replace(config.data, unreadable="skip")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load(source)
    except DataError as error:
        for problem in problems + [str(warning.message) for warning in caught]:
            say(messages, f"problem: {problem}")
        raise InvalidData(error) from None
    problems += [str(warning.message) for warning in caught] + _content_problems(data, config)
    problems += [*map(str, problems_of(config, data)), *unused_options([config], args)]
    if config.json:
        print_json({"description": describe(data, config), "problems": problems})
        return 1 if problems else 0
    for line in describe(data, config):
        say(messages, line)
    for problem in problems:
        say(messages, f"problem: {problem}")
    say(messages, counted(len(problems), "problem") if problems else "no problems")
    return 1 if problems else 0


def describe(data: Dataset, config: Doctor) -> list[str]:
    """Describe sizes, class counts, and the groups of classes by each split rule."""
    counts = data.train_counts
    largest, smallest = int(counts.max()), int(counts.min())
    lines = [
        f"{config.data.data}: {counted(data.num_classes, 'class', 'classes')}, samples {data.sample_shape}",
        f"training: {counted(len(data.y_train), 'sample')}, {largest:,} to {smallest:,} per class (ratio {largest / smallest:.0f}), "
        f"median {float(counts.double().median()):.0f}",
        f"test: {counted(len(data.y_test), 'sample')}",
        *data.notes,
    ]
    validation = "none; epochs are evaluated on the test samples"
    if data.y_val is not None:
        validation = counted(len(data.y_val), "sample")
    lines.append(f"validation: {validation}")
    for rule in SPLIT_RULES:
        sizes = (f"{int(mask.sum())} {group}" for group, mask in split_classes(counts, rule).items())
        lines.append(f"groups, {rule}: {', '.join(sizes)}")
    return lines


def _missing_files(config: Doctor) -> list[str]:
    """Find listed files that do not exist, and images that are listed twice or in two splits."""
    if not is_list(config.data.data):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # load() warns again
            lists = read_listings(config.data)
    except DataError:
        return []  # load() reports the error
    problems = []
    for part, listing in ((SPLITS[name], listing) for name, listing in lists.items()):
        missing = [file for file in listing.files if not file.is_file()]
        if missing:
            names = _first_names(list(map(str, missing)))
            advice = ""
            if len(missing) == len(listing):
                advice = "; none exists: set --images, the folder that paths start from, or --path-prefixes OLD=NEW"
            verb = "does" if len(missing) == 1 else "do"
            problems.append(
                f"{len(missing):,} of {counted(len(listing), f'{part} image')} {verb} not exist: {names}{advice}"
            )
        pairs = set(zip(listing.files, listing.labels, strict=True))
        if twice := len(listing) - len(pairs):
            problems.append(
                f"{counted(twice, f'{part} image is', f'{part} images are')} listed more than once"
            )
    for first, second in itertools.combinations(lists, 2):
        if shared := sorted(set(lists[first].files) & set(lists[second].files)):
            names = _first_names(list(map(str, shared)))
            problems.append(
                f"{counted(len(shared), 'image is', 'images are')} in the {SPLITS[first]} and the {SPLITS[second]} list: {names}"
            )
    return problems


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _content_problems(data: Dataset, config: Doctor) -> list[str]:
    """Find classes without test samples, blank images, and features that are zero or share one direction."""
    problems = []
    tested = torch.bincount(data.y_test, minlength=data.num_classes)
    if untested := (tested == 0).nonzero().flatten().tolist():
        names = _first_names([data.class_names[k] for k in untested])
        problems.append(f"{counted(len(untested), 'class', 'classes')} without a test sample: {names}")
    if data.is_images:
        flat = data.x_train[:2000].flatten(1)
        blank = int((flat == flat[:, :1]).all(1).sum())
        if blank:
            first = counted(len(flat), "training image")
            problems.append(
                f"{counted(blank, 'image has', 'images have')} a single color, of the first {first}"
            )
    else:
        if zero := int((data.x_train == 0).all(1).sum()):
            problems.append(f"{counted(zero, 'training sample')} with features that are all zero")
        is_shared = data.x_train.mean(0).norm() > 0.5 * data.x_train.norm(dim=1).mean()
        if is_shared and not config.model.center_features:
            problems.append(
                "all features share one direction (the norm of their mean is over half of their mean norm), which keeps "
                "displacements from being used; --center-features removes the direction"
            )
    return problems
