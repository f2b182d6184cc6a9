"""glyphs: the 8,141 most frequent Chinese characters, drawn with the system's fonts; a long tail that is no artefact.

Rendered once into the cache, which later runs only open. Training, validation and test images are of different type
families, so that what is tested is a character's form, not a font's. Without torch, so that the processes that draw
start at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cache import mapping, whole_folder
from ..errors import DataError
from .characters import character_frequencies, word_list
from .drawing import FINER, Variation, fit, ink
from .faces import FAMILIES, PACKAGES, Face, Survey, find_faces, survey, system_fonts

NAME = "glyphs"
VERSION = 1  # of how images are made: another gives other images, so that cached ones are made anew
BATCH = 1000  # images that a process draws at a time
#: Limits of the variations that training images draw uniformly: angle, shear, stretch, shrink, weight.
LOW = Variation(-0.12, -0.12, -0.15, -0.2, -1.0)
HIGH = Variation(0.12, 0.12, 0.15, 0.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """What the set is made of.

    A character has largest · sqrt(f / f_max) training images, where f is how often it is written and f_max how often the
    most frequent one is, but no fewer than `smallest`. The square root is the field's usual compromise between
    sampling by frequency and alike (Mahajan et al., ECCV 2018): by frequency itself seven classes of eight would have
    `smallest`. Each image has a family in turn, a face of it at random, and a variation of its own. Of validation and
    test there is a plain image for every family.
    """

    num_classes: int = 8141
    largest: int = 300
    smallest: int = 3
    families: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FAMILIES)
    fewest_families: int = 3  # in training that draw a character
    seed: int = 0


@dataclass(frozen=True)
class Glyphs:
    """Images [n, 1, size, size] uint8 (memory-mapped), white on black, and classes [n] int64 of each part: x_train,
    y_train, x_val, y_val, x_test, y_test. Characters in the order of the classes. What was used and left out, in words."""

    arrays: dict[str, np.ndarray]
    characters: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The images of a part to draw: class [n], index of the face [n], variation [n, 5]."""

    labels: np.ndarray
    faces: np.ndarray
    variations: np.ndarray


class Task(NamedTuple):
    """Images of one face that a process draws: their rows [n], n characters, variations [n, 5]."""

    face: Face
    rows: np.ndarray
    text: str
    variations: np.ndarray


def load_glyphs(
    size: int,
    cache: Path,
    frequencies: Mapping[str, int] | None = None,
    fonts: Sequence[Path] | None = None,
    rule: Rule | None = None,
    workers: int | None = None,
) -> Glyphs:
    """The set at `size` pixels a side, drawn if it is not in the cache yet.

    Args:
        size: side of the images, 8 or more.
        cache: where images are kept. Those there are used if characters, rule, and the font files' names, sizes and times
            are the same.
        frequencies: characters and how often they are written, the most frequent first; jieba's if None.
        fonts: font files; the system's if None.
        rule: the default `Rule()` if None.
        workers: processes; as many as there are processors if None.

    Raises:
        DataError: jieba or fonts are missing, or too few of them draw a character; the message says what to install.
    """
    if size < 8:
        raise DataError(f"--image-size: expected at least 8 for glyphs, got {size}")
    rule = rule or Rule()
    if frequencies is None:
        frequencies = character_frequencies(word_list(), rule.num_classes)
    fonts = system_fonts() if fonts is None else fonts
    folder = cache / f"{NAME}-{_key(size, frequencies, fonts, rule)}-{size}"
    if not (folder / "done.json").is_file():
        _make(size, folder, frequencies, find_faces(fonts, sum(rule.families.values(), ())), rule, workers)
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
    notes = json.loads((folder / "done.json").read_text(encoding="utf-8"))["notes"]
    return Glyphs(arrays, list(frequencies), tuple(notes))


def training_counts(frequencies: Sequence[int], rule: Rule) -> np.ndarray:
    """Training images of each class, [K], by the rule that `Rule` states."""
    share = np.sqrt(np.asarray(frequencies, dtype=np.float64) / max(frequencies))
    return np.maximum(np.round(rule.largest * share), rule.smallest).astype(np.int64)


def plan_training(counts: np.ndarray, drawn_by: Sequence[Mapping[str, list[int]]], seed: int) -> Plan:
    """Choose for each image a face and a variation.

    Args:
        counts: images of each class, [K].
        drawn_by: for each class, the indices of the faces that draw it, by family.
        seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    faces: list[int] = []
    for count, families in zip(counts.tolist(), drawn_by, strict=True):
        order = rng.permutation(len(families))  # so that a few images are of as many families
        choices = [list(families.values())[i] for i in order]
        places = rng.random(count)
        for image, place in enumerate(places.tolist()):
            choice = choices[image % len(choices)]
            faces.append(choice[int(place * len(choice))])
    labels = np.repeat(np.arange(len(counts)), counts)
    return Plan(labels, np.array(faces), rng.uniform(LOW, HIGH, (len(labels), len(LOW))))


def plan_plain(drawn_by: Sequence[Mapping[str, list[int]]]) -> Plan:
    """One image of each class for every family that draws it, with the first of the family's faces that do."""
    pairs = [(k, choice[0]) for k, families in enumerate(drawn_by) for choice in families.values()]
    labels, faces = np.array(pairs, dtype=np.int64).T
    return Plan(labels, faces, np.zeros((len(labels), len(LOW))))


def _key(size: int, frequencies: Mapping[str, int], fonts: Sequence[Path], rule: Rule) -> str:
    files = [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in fonts]
    said = json.dumps([VERSION, size, list(frequencies.items()), files, asdict(rule)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _make(
    size: int,
    folder: Path,
    frequencies: Mapping[str, int],
    found: list[Face],
    rule: Rule,
    workers: int | None,
) -> None:
    _check_families(found, rule)
    characters = list(frequencies)
    counts = training_counts(list(frequencies.values()), rule)
    most = int(counts.sum()) + len(counts) * len(sum(rule.families.values(), ()))
    with (
        whole_folder(folder, most * size * size) as aside,
        mapping(len(characters) * len(found) <= BATCH, workers) as each,
    ):
        look = functools.partial(survey, characters=characters, em=FINER * size)
        surveys = dict(zip(found, each(look, found), strict=True))
        faces, notes = _choose(surveys, rule, len(characters))
        for part, families in rule.families.items():
            drawn_by = _drawn_by(faces, surveys, families, len(characters))
            _check_cover(part, drawn_by, characters, rule)
            plan = plan_plain(drawn_by) if part != "train" else plan_training(counts, drawn_by, rule.seed)
            file = aside / f"x_{part}.npy"
            np.lib.format.open_memmap(file, "w+", np.uint8, (len(plan.labels), 1, size, size))
            np.save(aside / f"y_{part}.npy", plan.labels)
            list(each(functools.partial(_draw_into, file, size), _tasks(plan, faces, characters)))
        (aside / "done.json").write_text(json.dumps({"notes": notes}), encoding="utf-8")


def _choose(surveys: Mapping[Face, Survey], rule: Rule, total: int) -> tuple[list[Face], list[str]]:
    """The faces to draw with, and what is to be said of all: no repeats, none with less than half of the characters."""
    faces: list[Face] = []
    seen: dict[str, Face] = {}
    repeats, poor, blank, boxes = 0, [], 0, 0
    for face, looked in surveys.items():
        if looked.digest in seen:
            repeats += 1
        elif sum(looked.present) < total / 2:
            poor.append(f"{face.name} {face.style} ({sum(looked.present):,})")
        else:
            faces.append(face)
            blank, boxes = blank + looked.blank, boxes + looked.boxes
        seen.setdefault(looked.digest, face)
    notes = []
    for part, families in rule.families.items():
        numbers = [(name, sum(face.family == name for face in faces)) for name in families]
        said = (f"{name} ({n} faces)" if n > 1 else name for name, n in numbers if n)
        notes.append(f"type families, {part}: {', '.join(said)}")
        if absent := [name for name, n in numbers if not n]:
            notes.append(f"not installed: {', '.join(absent)} ({_install(absent)})")
    notes.append(
        f"left out: {repeats} faces that draw the same as another; {blank:,} blank glyphs; {boxes:,} boxes"
    )
    if poor:
        notes.append(f"left out, as they have less than half of {total:,} characters: {', '.join(poor)}")
    return faces, notes


def _drawn_by(
    faces: list[Face], surveys: Mapping[Face, Survey], families: Sequence[str], total: int
) -> list[dict[str, list[int]]]:
    """For each class, the indices of the faces that draw it, by family."""
    result: list[dict[str, list[int]]] = [{} for _ in range(total)]
    for index, face in enumerate(faces):
        if face.family in families:
            for k in np.flatnonzero(surveys[face].present):
                result[k].setdefault(face.family, []).append(index)
    return result


def _tasks(plan: Plan, faces: list[Face], characters: list[str]) -> list[Task]:
    by_face = np.argsort(plan.faces, kind="stable")
    groups = np.split(by_face, np.flatnonzero(np.diff(plan.faces[by_face])) + 1)
    batches = [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]
    return [
        Task(
            faces[plan.faces[rows[0]]],
            rows,
            "".join(characters[k] for k in plan.labels[rows]),
            plan.variations[rows],
        )
        for rows in batches
    ]


def _draw_into(array: Path, size: int, task: Task) -> None:
    images = np.load(array, mmap_mode="r+")
    font = task.face.open(FINER * size)
    for row, character, variation in zip(task.rows, task.text, task.variations.tolist(), strict=True):
        drawn = ink(font, character)
        assert drawn is not None  # the survey saw it
        images[row, 0] = fit(drawn, size, Variation(*variation))
    images.flush()


def _check_families(found: list[Face], rule: Rule) -> None:
    there = {face.family for face in found}
    for part, families in rule.families.items():
        absent = [family for family in families if family not in there]
        fewest = rule.fewest_families if part == "train" else len(families)
        if len(families) - len(absent) < fewest:
            expected = (
                f"at least {fewest} of {', '.join(families)}" if part == "train" else ", ".join(families)
            )
            raise DataError(
                f"glyphs: expected fonts of the type families {expected} for {part}, "
                f"got none of {', '.join(absent)}; to install them: {_install(absent)}"
            )


def _check_cover(
    part: str, drawn_by: Sequence[Mapping[str, list[int]]], characters: list[str], rule: Rule
) -> None:
    fewest = rule.fewest_families if part == "train" else 1
    poor = [characters[k] for k, families in enumerate(drawn_by) if len(families) < fewest]
    if poor:
        raise DataError(
            f"glyphs: expected each character in {fewest} type families or more for {part}, got fewer for {len(poor):,}: "
            f"{''.join(poor[:10])}; all families: {_install(rule.families[part])}"
        )


def _install(families: Sequence[str]) -> str:
    packages = sorted({PACKAGES.get(family, family) for family in families})
    return f"apt install {' '.join(packages)}"
