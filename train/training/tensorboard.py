"""Epochs as TensorBoard's scalars, beside metrics.jsonl: `tensorboard --logdir runs`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Board:
    """Event files of a run, in one folder for each method; their steps are image passes, which all methods share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._method = ""  # whose writer is open
        self._writer: SummaryWriter | None = None

    def restart(self, records: list[Record]) -> None:
        """Make the folder hold these records alone: event files can only be added to, so nothing would be taken back.

        Their times are then those of this call.
        """
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Write an epoch's record; a method's result, which follows its last epoch, closes its file."""
        if record["event"] != "epoch":
            self._close()
            return
        writer = self._open(record["method"])
        for tag, value in scalars(record):
            writer.add_scalar(tag, value, record["images"])
        writer.flush()

    def _open(self, method: str) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and is not everywhere there

        if self._writer is None or method != self._method:
            self._close()
            self._method, self._writer = method, SummaryWriter(str(self.folder / method))
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def scalars(record: Record, above: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a record, by its tag: `accuracy/many`, `slot_usage/0` (the centre), `displacement_norms/1`."""
    for name, value in record.items():
        if isinstance(value, list):
            # Displacements count from one, as slot 0 is the bare centre.
            value = {str(j): x for j, x in enumerate(value, start=name == "displacement_norms")}
        if isinstance(value, dict):
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{above}{name}", value
