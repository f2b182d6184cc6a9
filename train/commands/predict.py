"""The command `predict`: classifies image files with a trained model."""

from __future__ import annotations

import csv
import functools
import glob
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

from .. import load
from ..classifier import BATCH_SIZE, Classifier
from ..cli import check_device, parse_command
from ..config import ConfigError, DeviceConfig
from ..console import messages_of
from ..data.cache import process_map
from ..data.errors import DataError
from ..data.sources.image_files import SUFFIXES, decode
from ..data.sources.listing import read_listing
from ..files import write_atomically
from .model_file import expect_images, open_model

UNREADABLE = 3  # the exit code if a file could not be read

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Writes the most probable classes of image files, as CSV or JSON lines.

    A file that cannot be read is a row with the reason, and the exit code is then 3.
    """

    #: A trained model, runs/<name>/model-<method>.safetensors.
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    #: Image files, folders (searched recursively), globs in quotes, or lists (.txt, .csv) as for --data.
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
        raise ConfigError("images", "at least one image file", "none")
    for name in ("k", "batch_size", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(name, "at least 1", getattr(options, name))
    if options.out and not options.out.absolute().parent.is_dir():
        raise ConfigError("out", "a file in an existing folder", str(options.out))
    device = DeviceConfig(device=options.device).resolved_device
    check_device(device)
    classifier = open_model("model", options.model, load)
    expect_images("model", options.model, classifier.trained.model)
    shape = classifier.trained.sample_shape
    if shape[1] != shape[2]:
        raise ConfigError("model", "a model of square images", f"{options.model}, a model of images {shape}")
    classifier.to(device)
    k = min(options.k, len(classifier.classes))
    files = [file for source in options.images for file in find_files(source)]
    rows = _rows(classifier, files, k, options.batch_size, options.workers, options.flips)
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


def _rows(
    classifier: Classifier, files: list[Path], k: int, batch_size: int, workers: int | None, flips: bool
) -> Iterator[Row]:
    """Yield the path of each file with its classes and probabilities, or with the error."""
    decode_file = functools.partial(_decode, classifier.side)
    console = Console(stderr=True)
    starts = range(0, len(files), batch_size)
    with process_map(workers, serial=len(files) <= batch_size) as each:
        for start in track(starts, "images", console=console, disable=not console.is_terminal):
            batch = files[start : start + batch_size]
            decoded = list(each(decode_file, batch))
            images = [image for image in decoded if not isinstance(image, str)]
            found: Iterator[Row] = iter(())
            if images:
                best = classifier.predict(classifier.pixels(images), k, batch_size, flips)
                found = (
                    {"classes": names, "probabilities": values, "error": None}
                    for names, values in zip(best.classes, best.probabilities.tolist(), strict=True)
                )
            for file, image in zip(batch, decoded, strict=True):
                failed = {"classes": [], "probabilities": [], "error": image}
                yield {"path": str(file)} | (failed if isinstance(image, str) else next(found))


def _write(file: TextIO, rows: Iterator[Row], k: int, as_json: bool) -> int:
    """Write the rows and return the exit code."""
    code = 0
    writer = csv.writer(file, lineterminator="\n")
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
