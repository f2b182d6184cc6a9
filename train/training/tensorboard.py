"""TensorBoard's event files: `tensorboard --logdir runs`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .trackers import Record, Tracker, scalars_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Tracker):
    """Writes the event files of a run, in one folder per method.

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
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        writer = self._open(record["method"])
        for tag, value in scalars_of(record):
            writer.add_scalar(tag, value, record["images"])
        writer.flush()
        if record["event"] == "result":
            self.close()

    def _open(self, method: str) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and may not be installed

        if self._writer is None or method != self._method:
            self.close()
            self._method, self._writer = method, SummaryWriter(str(self.folder / method))
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
