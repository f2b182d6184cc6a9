"""First stages that several methods have in common, trained once.

COS+GIST, GistNet and its rotations and MLPs differ in their second stage alone, as do COS+CB and COS+CS+CB, and runs of one
method with other displacements. Each goes on from the same weights, optimiser, streams and random numbers that it would
have come to alone: on the CPU to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..config import Config
from ..files import write_atomically
from ..methods import FIRST_STAGES
from ..options import Mark
from .trainer import Training

Record = dict[str, Any]


class FirstStages:
    """Their files, one for each kind of first stage, options and data.

    Args:
        folder: where they are.
        config: the run's options.
        data: the data's fingerprint.
        kept: whether other runs may want them; otherwise a method's is kept only for the run's later ones.
    """

    def __init__(self, folder: Path, config: Config, data: str, kept: bool = False) -> None:
        self.folder, self.methods, self.kept = folder, config.method.methods, kept
        later = config.marked(Mark.CHANGEABLE | Mark.SECOND_STAGE)
        self._depends = {k: v for k, v in config.recorded().items() if k not in later}
        self._depends |= {"data": data, "torch": torch.__version__, "processes": distributed.world_size()}

    def _file(self, kind: str) -> Path:
        text = json.dumps(self._depends | {"kind": kind}, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"

    def load(self, training: Training) -> list[Record]:
        """Take `training` to the end of its first stage if another method or run has trained it.

        Returns the records of its epochs, as the method's own; none if it is still to be trained.
        """
        kind = FIRST_STAGES.get(training.name)
        saved = distributed.broadcast_from_rank0(lambda: self._read(kind)) if kind else None
        if saved is None:
            return []
        training.load_state_dict(saved["training"])
        return [record | {"method": training.name} for record in saved["records"]]

    def _read(self, kind: str) -> Record | None:
        file = self._file(kind)
        if not file.exists():
            return None
        saved: Record = torch.load(file, map_location="cpu", weights_only=True)
        return saved

    def save(self, training: Training, records: list[Record]) -> None:
        """Keep the first stage that `training` has come to the end of, if it will be wanted."""
        kind = FIRST_STAGES.get(training.name)
        later = map(FIRST_STAGES.get, self.methods[self.methods.index(training.name) + 1 :])
        if kind is None or not (self.kept or kind in later):
            return
        own = [r for r in records if r["event"] == "epoch" and r["method"] == training.name]
        records = [{"first_stage_of": training.name} | record for record in own]
        saved = {"training": training.state_dict(), "records": records}  # with others: of all processes
        if distributed.rank() == 0:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self._file(kind), lambda path: torch.save(saved, path))

    def clear(self) -> None:
        """Remove what no other run may want."""
        if not self.kept and distributed.rank() == 0 and self.folder.exists():
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()
