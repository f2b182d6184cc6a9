"""The command `predict`: classifies image files or stored features with a trained model."""

from __future__ import annotations

import functools
import glob
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .. import load
from ..classifier import BATCH_SIZE, Classifier
from ..cli import check_device, parse_command
from ..config import ConfigError, DeviceConfig
from ..console import messages_of
from ..data.errors import DataError
from ..data.processes import process_map
from ..data.sources.arrays import unlabeled
from ..data.sources.image_files import SUFFIXES, decode
from ..data.sources.listing import read_listing
from ..files import csv_writer, write_atomically
from .model_file import check_out, expect_images, open_model

UNREADABLE = 3  # the exit code if a file could not be read

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Writes the most probable classes of image files or of stored features, as CSV or JSON lines.

    A file that cannot be read is a row with the reason, and the exit code is then 3.
    """

    #: A trained model, runs/<name>/model-<method>.safetensors.
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    #: Image files, folders (searched recursively), globs in quotes, lists (.txt, .csv) as for --data, or files of features or
    #: images (.npz, .safetensors) with the array x, or with the arrays of a dataset, whose x_test is read.
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    #: Classes per image.
    k: int = 5
    #: Average the probabilities of each image and its mirror image.
    flips: bool = False
    #: Write JSON lines instead of CSV.
    json: bool = False
    #: The file to write; standard output if not given.
    out: Path | None = None
    #: cpu, cuda, or auto: a GPU if there is one.
    device: str = "auto"
    #: Images per pass.
    batch_size: int = BATCH_SIZE
    #: Processes that decode images; one per processor if not given.
    workers: int | None = None


def predict(args: list[str], console: Console) -> int:
    """Write the most probable classes of image files. Returns 3 if a file could not be read, otherwise 0.

    Raises:
        ConfigError: an option is invalid, the model does not take image files, or there are none.
    """
    options = parse_command(args, Predict, "predict")
    messages_of(console, as_json=True)  # rows alone are on standard output
    if not options.images:
        raise ConfigError("images", "at least one file", "none")
    for name in ("k", "batch_size", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(name, "at least 1", getattr(options, name))
    if options.out:
        check_out(options.out, options.model)
    device = DeviceConfig(device=options.device).resolved_device
    check_device(device)
    classifier = open_model("model", options.model, load)
    shape = classifier.trained.sample_shape
    if options.flips:
        expect_images("model", options.model, classifier.trained.model)
    groups = [(is_arrays, list(words)) for is_arrays, words in itertools.groupby(options.images, _is_arrays)]
    if not all(is_arrays for is_arrays, _ in groups):
        expect_images("model", options.model, classifier.trained.model)
        if shape[1] != shape[2]:
            got = f"{options.model}, a model of images {shape}"
            raise ConfigError("model", "a model of square images", got)
    found = [
        (is_arrays, [file for word in words for file in ([Path(word)] if is_arrays else find_files(word))])
        for is_arrays, words in groups
    ]
    classifier.to(device)
    k = min(options.k, len(classifier.classes))
    rows = _rows(classifier, found, options)
    try:
        return _write_to(options.out, rows, k, options.json)
    except DataError as error:  # the system ended a process
        raise ConfigError("workers", "processes that decode all images", f"an error: {error}") from None


def _write_to(out: Path | None, rows: Iterator[Row], k: int, as_json: bool) -> int:
    """Write the rows to a file or to standard output, and return the exit code."""
    if not out:
        return _write(sys.stdout, rows, k, as_json)
    codes = []

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            codes.append(_write(file, rows, k, as_json))

    write_atomically(out, write)
    return codes[0]


def find_files(source: str) -> list[Path]:
    """Return the image files that a word of the command line names. A file that does not exist is returned too.

    Raises:
        ConfigError: a folder, a glob or a list names no image file.
    """
    path = Path(source)
    if path.is_dir():
        return _some(source, (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES))
    if not path.exists() and glob.has_magic(source):
        return _some(source, map(Path, glob.iglob(source, recursive=True)))
    if path.suffix in (".txt", ".csv"):
        try:
            return read_listing(source).files
        except DataError as error:
            raise ConfigError("images", "a list of images", f"{source} ({error})") from None
    return [path]


def _some(source: str, found: Iterator[Path]) -> list[Path]:
    files = sorted(file for file in found if not file.is_dir())
    if not files:
        raise ConfigError("images", "at least one image file", f"none in {source}")
    return files


def _decode(size: int, file: Path) -> np.ndarray | str:
    """Return an image, or the reason why the file cannot be read."""
    try:
        return decode(file, size)
    except DataError as error:
        return str(error).removeprefix(f"{file}: ")


def _is_arrays(word: str) -> bool:
    return Path(word).suffix in (".npz", ".safetensors")


def _rows(classifier: Classifier, groups: list[tuple[bool, list[Path]]], options: Predict) -> Iterator[Row]:
    """Yield the rows of groups of files, which are files of arrays if the first value of a group is True."""
    for is_arrays, files in groups:
        if is_arrays:
            for file in files:
                yield from _array_rows(classifier, file, options)
        else:
            yield from _image_rows(classifier, files, options)


def _array_rows(classifier: Classifier, file: Path, options: Predict) -> Iterator[Row]:
    """Yield a row per sample of a file of arrays, with its position as in `features.npz[0]`; or one with the error."""
    try:
        name, x = unlabeled(file)
    except DataError as error:
        yield _failed(str(file), str(error).removeprefix(f"{file}: "))
        return
    expected, got = classifier.trained.sample_shape, list(x.shape[1:])
    if got != expected:
        yield _failed(str(file), f"{name}: expected samples {expected}, which the model takes, got {got}")
        return
    for rows in _batches(len(x), options.batch_size, file.name):
        paths = [f"{file}[{i}]" for i in range(rows.start, rows.stop)]
        yield from _classified(classifier, paths, x[rows], options)


def _image_rows(classifier: Classifier, files: list[Path], options: Predict) -> Iterator[Row]:
    """Yield the path of each file with its classes and probabilities, or with the error."""
    decode_file = functools.partial(_decode, classifier.side)
    with process_map(options.workers, serial=len(files) <= options.batch_size) as each:
        for rows in _batches(len(files), options.batch_size, "images"):
            decoded = list(each(decode_file, files[rows]))
            paths, images = list(map(str, files[rows])), [x for x in decoded if not isinstance(x, str)]
            read = [path for path, image in zip(paths, decoded, strict=True) if not isinstance(image, str)]
            found: Iterator[Row] = iter(())
            if images:
                found = _classified(classifier, read, classifier.pixels(images), options)
            for path, image in zip(paths, decoded, strict=True):
                yield _failed(path, image) if isinstance(image, str) else next(found)


def _batches(count: int, size: int, shown: str) -> Iterator[slice]:
    """Yield the slices of batches, with a progress bar on standard error."""
    console = Console(stderr=True)
    starts = range(0, count, size)
    for start in track(starts, shown, console=console, disable=not console.is_terminal):
        yield slice(start, min(start + size, count))


def _classified(classifier: Classifier, paths: list[str], x: Tensor, options: Predict) -> Iterator[Row]:
    best = classifier.predict(x, options.k, options.batch_size, options.flips)
    for path, names, values in zip(paths, best.classes, best.probabilities.tolist(), strict=True):
        yield {"path": path, "classes": names, "probabilities": values, "error": None}


def _failed(path: str, error: str) -> Row:
    return {"path": path, "classes": [], "probabilities": [], "error": error}


def _write(file: TextIO, rows: Iterator[Row], k: int, as_json: bool) -> int:
    """Write the rows and return the exit code."""
    code = 0
    writer = csv_writer(file)
    if not as_json:
        ranks = range(1, k + 1)
        writer.writerow(
            ["path", *(f"{name}_{i}" for i in ranks for name in ("class", "probability")), "error"]
        )
    for row in rows:
        code = UNREADABLE if row["error"] else code
        if as_json:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            pairs = zip(row["classes"], (f"{p:.6f}" for p in row["probabilities"]), strict=True)
            cells = [cell for pair in pairs for cell in pair] or [""] * (2 * k)
            writer.writerow([row["path"], *cells, row["error"] or ""])
    return code
