"""The glyphs dataset: the 8,141 most frequent Chinese characters, rendered with the system's fonts.

The long tail follows how often the characters are used. Training, validation and test images have different font
families, so that a classifier must recognize the character's form and not the font. The images are rendered once into
the cache, which later runs open. This module does not import torch, so that worker processes start quickly.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cache import atomic_folder, folder_lock, reserve
from ..errors import DataError
from ..processes import process_map
from .characters import character_frequencies, word_list
from .drawing import SUPERSAMPLING, Variation, fit_to_square, render_ink
from .faces import PACKAGES, Coverage, Face, check_coverage, find_faces, system_fonts
from .plan import ClassFaces, Plan, Rule, plan_evaluation, plan_training, training_counts

NAME = "glyphs"
VERSION = 1  # version of the images' content; a change makes cached images obsolete
BATCH = 1000  # images per task of a worker process


@dataclass(frozen=True)
class Glyphs:
    """The dataset.

    Attributes:
        arrays: x_train, y_train, x_val, y_val, x_test, y_test: images [n, 1, size, size] uint8 (memory-mapped), white
            on black, and classes [n] int64.
        characters: the character of each class.
        notes: sentences on the fonts that were used and left out.
    """

    arrays: dict[str, np.ndarray]
    characters: list[str]
    notes: tuple[str, ...]


class DrawTask(NamedTuple):
    """Images of one face for a worker process to draw: their rows [n], n characters, deformations [n, 5]."""

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
    """Open the dataset at `size` pixels per side, and draw it first if it is not in the cache.

    Args:
        size: side of the images, at least 8.
        cache: the folder of cached images. They are reused if characters, rule, and the font files' names, sizes and
            times are unchanged.
        frequencies: characters and their frequencies in descending order; from jieba if None.
        fonts: font files; all of the system if None.
        rule: the parameters of the dataset; `Rule()` if None.
        workers: number of processes; one per processor if None.

    Raises:
        DataError: jieba or fonts are missing, or too few fonts draw a character. The message says what to install.
    """
    if size < 8:
        raise DataError(f"--image-size: expected at least 8 for glyphs, got {size}")
    rule = rule or Rule()
    if frequencies is None:
        frequencies = character_frequencies(word_list(), rule.num_classes)
    fonts = system_fonts() if fonts is None else fonts
    folder = cache / f"{NAME}-{_cache_key(size, frequencies, fonts, rule)}-{size}"
    with folder_lock(folder):
        if not (folder / "done.json").is_file():
            _draw_dataset(
                size, folder, frequencies, find_faces(fonts, sum(rule.families.values(), ())), rule, workers
            )
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        notes = json.loads((folder / "done.json").read_text(encoding="utf-8"))["notes"]
    return Glyphs(arrays, list(frequencies), tuple(notes))


def _cache_key(size: int, frequencies: Mapping[str, int], fonts: Sequence[Path], rule: Rule) -> str:
    files = [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in fonts]
    content = json.dumps([VERSION, size, list(frequencies.items()), files, asdict(rule)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _draw_dataset(
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
    most_images = int(counts.sum()) + len(counts) * len(sum(rule.families.values(), ()))
    with (
        atomic_folder(folder, most_images * size * size) as temporary,
        process_map(workers, serial=len(characters) * len(found) <= BATCH) as each,
    ):
        check = functools.partial(check_coverage, characters=characters, em=SUPERSAMPLING * size)
        coverage = dict(zip(found, each(check, found), strict=True))
        faces, notes = _select_faces(coverage, rule, len(characters))
        for split, families in rule.families.items():
            class_faces = _faces_by_class(faces, coverage, families, len(characters))
            _check_class_faces(split, class_faces, characters, rule)
            training = split == "train"
            plan = plan_training(counts, class_faces, rule.seed) if training else plan_evaluation(class_faces)
            file = temporary / f"x_{split}.npy"
            np.lib.format.open_memmap(file, "w+", np.uint8, (len(plan.labels), 1, size, size))
            reserve(file, file.stat().st_size)
            np.save(temporary / f"y_{split}.npy", plan.labels)
            list(each(functools.partial(_draw_into, file, size), _tasks(plan, faces, characters)))
        (temporary / "done.json").write_text(json.dumps({"notes": notes}), encoding="utf-8")


def _select_faces(coverage: Mapping[Face, Coverage], rule: Rule, total: int) -> tuple[list[Face], list[str]]:
    """Leave out duplicate faces and those with less than half of the characters; return the others, and notes."""
    faces: list[Face] = []
    seen: set[str] = set()
    duplicates, incomplete, blank, boxes = 0, [], 0, 0
    for face, covered in coverage.items():
        if covered.digest in seen:
            duplicates += 1
        elif sum(covered.present) < total / 2:
            incomplete.append(f"{face.name} {face.style} ({sum(covered.present):,})")
        else:
            faces.append(face)
            blank, boxes = blank + covered.num_blank, boxes + covered.num_boxes
        seen.add(covered.digest)
    notes = []
    for split, families in rule.families.items():
        numbers = [(name, sum(face.family == name for face in faces)) for name in families]
        used = (f"{name} ({n} faces)" if n > 1 else name for name, n in numbers if n)
        notes.append(f"font families, {split}: {', '.join(used)}")
        if absent := [name for name, n in numbers if not n]:
            notes.append(f"not installed: {', '.join(absent)} ({_install_command(absent)})")
    notes.append(
        f"left out: {duplicates} duplicate faces; {blank:,} blank glyphs; {boxes:,} placeholder boxes"
    )
    if incomplete:
        notes.append(f"left out (less than half of the {total:,} characters): {', '.join(incomplete)}")
    return faces, notes


def _faces_by_class(
    faces: list[Face], coverage: Mapping[Face, Coverage], families: Sequence[str], total: int
) -> list[dict[str, list[int]]]:
    """Return, for each class, the indices of the faces that draw it, by family."""
    result: list[dict[str, list[int]]] = [{} for _ in range(total)]
    for index, face in enumerate(faces):
        if face.family in families:
            for k in np.flatnonzero(coverage[face].present):
                result[k].setdefault(face.family, []).append(index)
    return result


def _tasks(plan: Plan, faces: list[Face], characters: list[str]) -> list[DrawTask]:
    by_face = np.argsort(plan.faces, kind="stable")
    groups = np.split(by_face, np.flatnonzero(np.diff(plan.faces[by_face])) + 1)
    batches = [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]
    return [
        DrawTask(
            faces[plan.faces[rows[0]]],
            rows,
            "".join(characters[k] for k in plan.labels[rows]),
            plan.variations[rows],
        )
        for rows in batches
    ]


def _draw_into(array: Path, size: int, task: DrawTask) -> None:
    images = np.load(array, mmap_mode="r+")
    font = task.face.open(SUPERSAMPLING * size)
    for row, character, variation in zip(task.rows, task.text, task.variations.tolist(), strict=True):
        ink = render_ink(font, character)
        assert ink is not None  # check_coverage found it
        images[row, 0] = fit_to_square(ink, size, Variation(*variation))
    images.flush()


def _check_families(found: list[Face], rule: Rule) -> None:
    installed = {face.family for face in found}
    for split, families in rule.families.items():
        absent = [family for family in families if family not in installed]
        fewest = rule.fewest_families if split == "train" else len(families)
        if len(families) - len(absent) < fewest:
            raise DataError(
                f"glyphs: expected at least {fewest} of the font families {', '.join(families)} for the split "
                f"{split}, got none of {', '.join(absent)}; install them with: {_install_command(absent)}"
            )


def _check_class_faces(split: str, class_faces: ClassFaces, characters: list[str], rule: Rule) -> None:
    fewest = rule.fewest_families if split == "train" else 1
    lacking = [characters[k] for k, families in enumerate(class_faces) if len(families) < fewest]
    if lacking:
        raise DataError(
            f"glyphs: expected {fewest} or more font families per character for the split {split}, got fewer for "
            f"{''.join(lacking[:10])} ({len(lacking):,} in all); "
            f"install all families with: {_install_command(rule.families[split])}"
        )


def _install_command(families: Sequence[str]) -> str:
    packages = sorted({PACKAGES.get(family, family) for family in families})
    return f"apt install {' '.join(packages)}"
