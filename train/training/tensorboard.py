"""The records of epochs as TensorBoard scalars: `tensorboard --logdir runs`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class TensorBoardWriter:
    """Writes the event files of a run, in one folder per method. Steps are image passes, which all methods have in common.

    Args:
        folder: contains the folders of the methods.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._method = ""  # method of the open writer
        self._writer: SummaryWriter | None = None

    def restart(self, records: list[Record]) -> None:
        """Replace all event files by new ones with these records, because records cannot be removed from event files.

        Their wall-clock times are those of this call.
        """
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Write the record of an epoch. The result of a method, which follows its last epoch, closes the file."""
        if record["event"] != "epoch":
            self._close()
            return
        writer = self._open(record["method"])
        for tag, value in scalars(record):
            writer.add_scalar(tag, value, record["images"])
        writer.flush()

    def _open(self, method: str) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and may not be installed

        if self._writer is None or method != self._method:
            self._close()
            self._method, self._writer = method, SummaryWriter(str(self.folder / method))
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


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
