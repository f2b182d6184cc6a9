"""The folder of a run.

If a process is killed at any moment, each file is complete or has its previous content. Only the last lines of
metrics.jsonl and the trackers' files may be incomplete; a resumed run rewrites them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from .. import distributed
from ..config import Config, ConfigError
from ..console import printable
from ..data.dataset import Dataset
from ..files import append_line, check_writable, existing_folder, write_atomically
from .checkpoint import DamagedFileError, load_trainer_file, save_trainer
from .continuation import continued, environment
from .lock import LOCK
from .mlflow_runs import MlflowRuns
from .tensorboard import TensorBoard
from .trackers import Tracker, Trackers
from .wandb_runs import WandbRuns

if TYPE_CHECKING:
    from .trainer import Trainer

#: Name in the records of earlier versions -> name of today.
RENAMED = {"centres alone": "centers alone"}

Record = dict[str, Any]  # a line of metrics.jsonl: the record of an epoch, or the result of a method


class RunFolder:
    """`runs/<name>/`: config.toml, metrics.jsonl, checkpoint.pt, trained models, the report; the trackers' files with --track.

    Only rank 0 writes.

    Args:
        config: the options of the run.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.runs) / config.run.name
        self.config_file = self.path / "config.toml"
        self.checkpoint_file = self.path / "checkpoint.pt"
        self.metrics_file = self.path / "metrics.jsonl"
        self.records: list[Record] = []
        self._checkpoint_time = -math.inf  # when the last checkpoint was saved
        self._data_fingerprint = ""  # set by `open`, on rank 0
        self.trackers = Trackers({})  # set by `open`, on rank 0

    def check_new(self, config: Config) -> None:
        """Check that the run would not overwrite another one.

        Raises:
            ConfigError: the folder has results and is not resumed, or cannot be written to.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError("name", "a folder", f"{self.path}, which is a file")
            if not config.run.resume and self.path.exists() and self._has_results():
                advice = "choose another --name, or continue it with --resume"
                raise ConfigError("name", "a new run", f"{self.path}, which exists; {advice}")
            check_writable(existing_folder(self.path))
        except OSError as error:
            raise ConfigError("runs", "a writable folder", f"{self.path} ({error.strerror})") from None

    def open(self, config: Config, data: Dataset) -> tuple[Config, dict[str, Any] | None]:
        """Write the options into the folder, whose lock is held, and return the checkpoint to resume from, if there is one.

        Returns:
            The options, with the methods in the order in which the run trains them; and the checkpoint, or None to start.

        Raises:
            ConfigError: the run would overwrite another one, or resume one with other options or data.
        """
        self.check_new(config)
        saved, data_fingerprint = self._load_checkpoint(), data.fingerprint()
        if saved and saved["data"] != data_fingerprint:
            expected = f"the data that the run began with ({saved['data']})"
            raise ConfigError("data", expected, f"{config.data.data} ({data_fingerprint})")
        if saved:
            if not self.config_file.exists():  # as after a removal of the folder that the run has outlived
                expected = f"{self.config_file}, the options that the checkpoint was trained with"
                advice = "put a copy in its place, or delete the folder to train from the beginning"
                raise ConfigError("resume", expected, f"a checkpoint without it; {advice}")
            config = continued(config, self.config_file, saved, data.train_counts)
        self._data_fingerprint = data_fingerprint
        self.trackers = make_trackers(config, self.path)
        values = {name: value for name, value in config.recorded().items() if value is not None}
        text = f"# From the recipe {printable(config.run.recipe)}. `--recipe` accepts this file.\n{tomli_w.dumps(values)}"
        self.write(self.config_file.name, lambda path: path.write_text(text, encoding="utf-8"))
        described = json.dumps(environment(config), indent=2) + "\n"
        self.write("environment.json", lambda path: path.write_text(described, encoding="utf-8"))
        return config, saved

    def _has_results(self) -> bool:
        """Return whether the folder has more files than a run leaves that ends before its first epoch."""
        initial = {
            "config.toml",
            "environment.json",
            "metrics.jsonl",
            "tensorboard",
            "wandb",
            "wandb.json",
            "mlflow.json",
            LOCK,
        }
        has_records = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        return has_records or any(entry.name not in initial for entry in self.path.iterdir())

    def _load_checkpoint(self) -> dict[str, Any] | None:
        if not self.checkpoint_file.exists():
            return None
        try:
            saved = load_trainer_file(self.checkpoint_file, "records", "data")
        except DamagedFileError as error:
            advice = "put a copy in its place, or delete it to train from the beginning"
            raise ConfigError("resume", "a whole checkpoint", f"{error}; {advice}") from None
        return saved | {"records": with_current_names(saved["records"])}

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write the file `name` atomically with `write`, which is called with a temporary path."""
        if distributed.rank() == 0:
            write_atomically(self.path / name, write)

    def save_checkpoint(self, trainer: Trainer, min_seconds: float | None = None) -> None:
        """Save the records and the trainer's state. All processes call the method.

        Args:
            trainer: the trainer.
            min_seconds: skip the checkpoint if the last one is more recent; None never skips it.
        """
        # The clocks of the processes differ, so rank 0 decides.
        if min_seconds and not distributed.broadcast_from_rank0(
            lambda: self._checkpoint_age() >= min_seconds
        ):
            return
        checkpoint = {"records": self.records, "data": self._data_fingerprint}
        save_trainer(self.checkpoint_file, trainer, checkpoint)
        self._checkpoint_time = time.monotonic()

    def _checkpoint_age(self) -> float:
        return time.monotonic() - self._checkpoint_time

    def start_records(self, records: list[Record]) -> None:
        """Set the records to those of the checkpoint, and rewrite metrics.jsonl and the trackers' files with them."""
        self.records = records
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.write(self.metrics_file.name, lambda path: path.write_text(text, encoding="utf-8"))
        self.trackers.restart(records)

    def append_record(self, record: Record) -> None:
        """Append a record to the records, to metrics.jsonl and to the trackers."""
        self.records.append(record)
        if distributed.rank() == 0:
            append_line(self.metrics_file, json.dumps(record))
            self.trackers.append(record)


def make_trackers(config: Config, folder: Path) -> Trackers:
    """Return the trackers that the options name."""
    about = folder, config.run.name, config.recorded()
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WandbRuns(*about),
        "mlflow": lambda: MlflowRuns(*about),
    }
    return Trackers({name: makers[name]() for name in config.run.track})


def with_current_names(records: list[Record]) -> list[Record]:
    """Return records of any version with the names of this one."""
    for record in records:
        if "accuracy_of" in record:
            record["accuracy_of"] = {RENAMED.get(name, name): a for name, a in record["accuracy_of"].items()}
    return records
