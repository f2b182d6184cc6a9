"""Trackers of a run, by --track: the numbers of every epoch and result also go to TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..console import printable
from ..files import write_atomically

Record = dict[str, Any]

#: Values of a result that are one per class or sample, too many for a tracker.
DETAILS = {"accuracy_per_class", "train_counts", "test_counts", "analysis"}


class Tracker(ABC):
    """A library that stores numbers by name and step. Steps are image passes, which all methods have in common."""

    @abstractmethod
    def restart(self, records: list[Record]) -> None:
        """Bring the tracker to the records of the checkpoint that the run starts from, none for a new run."""

    @abstractmethod
    def append(self, record: Record) -> None:
        """Store the record of an epoch, or the result of a method, which follows its last epoch."""

    @abstractmethod
    def close(self) -> None:
        """End what is open, as the run ends here or is interrupted."""


class Trackers:
    """The trackers of a run. An error of one is a warning, and the run goes on without it.

    Args:
        trackers: the trackers by name.
    """

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers

    def restart(self, records: list[Record]) -> None:
        self._each(lambda tracker: tracker.restart(records))

    def append(self, record: Record) -> None:
        self._each(lambda tracker: tracker.append(record))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # of a library, a network or a disk
                del self._trackers[name]
                reason = printable(f"{type(error).__name__}: {error}".partition("\n")[0])
                message = f"--track {name}: the run goes on without it ({reason})"
                warnings.warn(message, RuntimeWarning, stacklevel=2)


class RunTracker(Tracker):
    """A tracker with a run of its own for each method, which a resumed run continues.

    `FILE` in the run's folder holds the id and the last record of each. Records cannot be taken back, so that epochs that are
    trained again after an interruption are left out.

    Args:
        folder: the run's folder.
        name: the name of the run.
        options: the options of the run.
    """

    FILE: ClassVar[str]

    def __init__(self, folder: Path, name: str, options: dict[str, Any]) -> None:
        self._folder, self._name, self._options = folder, name, options
        self._file = folder / self.FILE
        self._runs: dict[str, dict[str, Any]] = {}
        self._method = ""  # method of the open run

    @abstractmethod
    def _open(self, method: str, run: str) -> str:
        """Open the run of a method with an id, or a new one for an empty id; return its id."""

    @abstractmethod
    def _log(self, values: dict[str, float], step: int) -> None:
        """Store numbers in the open run."""

    @abstractmethod
    def _finish(self, complete: bool) -> None:
        """Close the open run, which has its result or was interrupted."""

    def restart(self, records: list[Record]) -> None:
        if self._file.exists():
            self._runs = json.loads(self._file.read_text(encoding="utf-8"))
        for record in records:  # those from before the option was given
            self.append(record)

    def append(self, record: Record) -> None:
        method, last = record["method"], [record["images"], record["event"] == "result"]
        run = self._runs.get(method, {"id": "", "last": [-1, False]})
        if last <= run["last"]:
            return
        if method != self._method:
            self.close()
            self._save(method, run | {"id": self._open(method, run["id"])})
            self._method = method
        self._log(dict(scalars_of(record)), record["images"])
        self._save(method, self._runs[method] | {"last": last})
        if record["event"] == "result":
            self._method = ""
            self._finish(complete=True)

    def _save(self, method: str, run: dict[str, Any]) -> None:
        self._runs[method] = run
        text = json.dumps(self._runs)
        write_atomically(self._file, lambda path: path.write_text(text, encoding="utf-8"))

    def close(self) -> None:
        if self._method:
            self._method = ""
            self._finish(complete=False)


def scalars_of(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the tag and value of the numbers of an epoch, or of a result, whose tags begin with `result/`."""
    if record["event"] == "epoch":
        yield from scalars(record)
    else:
        yield from scalars({k: v for k, v in record.items() if k not in DETAILS}, "result/")


def scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the tag and value of every number in a record, such as `accuracy/many` and `slot_usage/0` (the bare center)."""
    for name, value in record.items():
        if isinstance(value, list):
            # Displacements count from one because slot 0 is the bare center.
            value = {str(j): x for j, x in enumerate(value, start=name == "displacement_norms")}
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
