"""A run from its options to its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import distributed
from .checks import check_options, fill_in
from .config import Config, ConfigError
from .console import counted, say
from .data.dataset import Dataset
from .data.errors import DataError
from .data.load import load as load_data
from .methods import TITLES
from .model.backbones import BackboneError
from .options import InvalidData
from .report import figures
from .report.data_record import FILE as DATA_RECORD
from .report.data_record import data_record
from .report.html import read_records, write_page
from .report.table import print_results
from .training.first_stages import FirstStages
from .training.input import image_passes
from .training.lock import locked
from .training.progress import Display
from .training.run_folder import RunFolder
from .training.train_methods import train_methods


def start(config: Config, console: Console, shared: Path | None = None) -> list[dict[str, Any]]:
    """Load the data, train all methods, write the report, and return the results of all methods.

    Args:
        config: the options.
        console: the console for messages and progress.
        shared: a folder of first stages that other runs may share with this run.

    Raises:
        ConfigError: an invalid option.
        Diverged: the loss or a weight is not finite.
    """
    folder = RunFolder(config)
    # Before images are decoded, which may take hours.
    distributed.broadcast_from_rank0(lambda: folder.check_new(config))
    with distributed.local_rank0_first():
        data = load(config)
    check_options(config, data, shared is not None)
    with locked(folder.path):
        return _train(fill_in(config, data), data, folder, console, shared)


def _train(
    config: Config, data: Dataset, folder: RunFolder, console: Console, shared: Path | None
) -> list[dict[str, Any]]:
    config, saved = distributed.broadcast_from_rank0(lambda: folder.open(config, data))
    first_stages = FirstStages(
        shared or folder.path / "first-stages", config, data.fingerprint(), shared=shared is not None
    )
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    announce(console, config, data, saved)
    with Display(console, images_in_all(config, data), images_done(saved)) as display:
        try:
            results = train_methods(config, data, folder, first_stages, display, saved)
        except BackboneError as error:  # pretrained weights that cannot be loaded
            raise ConfigError("backbone", str(error), repr(config.model.backbone)) from None
        finally:
            folder.trackers.close()
    print_results(console, results, data.train_counts, config.run.split_rule)
    if distributed.rank() == 0:
        write_report(config, data, folder, results, console)
        say(console, f"written to {folder.path}")
    return results


def write_report(
    config: Config, data: Dataset, folder: RunFolder, results: list[dict[str, Any]], console: Console
) -> None:
    """Write accuracy.png, report.json and report.html.

    An error in them, but for that of a disk, is a warning: the models are trained.
    """
    titled = {TITLES[result["method"]]: result for result in results}
    about = f"Trained with torch {torch.__version__} on {config.runtime.resolved_device}."
    try:
        facts = data_record(
            data,
            results,
            name=config.data.data,
            split_rule=config.run.split_rule,
            backbone=config.model.backbone,
            seed=config.run.seed,
        )
        details = json.dumps(facts)
        folder.write(DATA_RECORD, lambda path: path.write_text(details, encoding="utf-8"))
        if drawn := figures.accuracy_by_size(titled):
            folder.write("accuracy.png", lambda path: path.write_bytes(drawn))
        records = {config.run.name: read_records(folder.path)}
        folder.write("report.html", lambda path: write_page(path, records, config.run.name, about))
    except OSError:
        raise
    except Exception as error:
        say(console, f"warning: the report is incomplete: {type(error).__name__}: {error}")


def load(config: Config) -> Dataset:
    """Load the data.

    Raises:
        ConfigError: the data cannot be read.
    """
    try:
        return load_data(config.data)
    except DataError as error:
        raise InvalidData(error) from None


def describe_data(config: Config, data: Dataset) -> str:
    """Describe the data in one line."""
    counts = data.train_counts
    samples = "images" if data.is_images else "features"
    validation = "" if data.y_val is None else f", {len(data.y_val):,} for validation"
    return (
        f"{config.data.data}: {len(data.y_train):,} training {samples} {data.sample_shape} in {counted(data.num_classes, 'class', 'classes')} "
        f"({int(counts.max()):,} to {int(counts.min()):,} samples per class), {len(data.y_test):,} for testing{validation}"
    )


def announce(console: Console, config: Config, data: Dataset, saved: dict[str, Any] | None) -> None:
    """Print the data, the device, and the checkpoint that the run continues from."""
    lines = [
        describe_data(config, data),
        f"backbone {config.model.backbone}, {config.runtime.resolved_device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}",
    ]
    if saved:
        at = saved["training"]["position"]
        where = f"{saved['training']['name']} stage {at['stage'] + 1} epoch {at['epoch']} step {at['step_of_epoch']}"
        lines.append(f"resuming after {where}")
    elif config.run.resume:
        lines.append("no checkpoint to resume; starting from the beginning")
    if data.y_val is None:
        lines.append(
            "warning: no validation split, so epochs are evaluated on the test samples; do not tune options on them"
        )
    for line in (*lines, *data.notes):
        say(console, line)


def images_in_all(config: Config, data: Dataset) -> int:
    """Return the number of image passes of all methods and stages."""
    return sum(image_passes(config, data, method) for method in config.method.methods)


def images_done(saved: dict[str, Any] | None) -> int:
    """Return the number of image passes before the checkpoint."""
    if not saved:
        return 0
    training = saved["training"]
    finished = (r for r in saved["records"] if r["event"] == "result" and r["method"] != training["name"])
    return int(training["position"]["images"] + sum(record["images"] for record in finished))
