"""First stages that several methods or runs share, so that they are trained once.

COS+GIST, GistNet and its rotations and MLPs differ in their second stage only, as do COS+CB and COS+CS+CB, and runs of
one method with other displacements. Each continues from the same weights, optimizer, streams and random numbers that it
would have reached alone; on the CPU, from the same bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import distributed
from ..config import Config
from ..methods import FIRST_STAGES
from ..options import Mark
from .checkpoint import DamagedFileError, load_trainer_file, save_trainer
from .run_folder import Record

if TYPE_CHECKING:
    from .trainer import Trainer


class FirstStages:
    """The files of trained first stages: one per group of methods, options and data.

    Args:
        folder: contains the files.
        config: the options of the run.
        data_fingerprint: the fingerprint of the data.
        shared: other runs use the folder too. Otherwise a first stage is saved only if a later method of this run needs it.
    """

    def __init__(self, folder: Path, config: Config, data_fingerprint: str, shared: bool = False) -> None:
        self.folder, self.methods, self.shared = folder, config.method.methods, shared
        later = config.marked(Mark.CHANGEABLE | Mark.SECOND_STAGE)
        self._key = {name: value for name, value in config.recorded().items() if name not in later}
        self._key |= {
            "data": data_fingerprint,
            "device": config.runtime.resolved_device,
            "torch": torch.__version__,
            "processes": distributed.world_size(),
        }

    def _file(self, group: str, epochs: int) -> Path:
        text = json.dumps(self._key | {"kind": group, "epochs": epochs}, sort_keys=True)
        return self.folder / f"{group}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"

    def load(self, trainer: Trainer) -> list[Record]:
        """Move a new trainer to the end of its first stage if another method or run has trained it.

        Returns:
            The records of its epochs, with the trainer's method; an empty list if the stage remains to be trained.
        """
        group = FIRST_STAGES.get(trainer.name)
        epochs = trainer.method.stages[0].epochs
        saved = distributed.broadcast_from_rank0(lambda: self._read(group, epochs)) if group else None
        if saved is None:
            return []
        trainer.load_state_dict(saved["training"])
        return [record | {"method": trainer.name} for record in saved["records"]]

    def _read(self, group: str, epochs: int) -> dict[str, Any] | None:
        file = self._file(group, epochs)
        if not file.exists():
            return None
        try:
            return load_trainer_file(file, "records")
        except DamagedFileError as error:
            warnings.warn(f"a first stage is trained again: got {error}", RuntimeWarning, stacklevel=2)
            return None

    def save(self, trainer: Trainer, records: list[Record]) -> None:
        """Save the first stage that a trainer has finished, if another method or run may need it."""
        group = FIRST_STAGES.get(trainer.name)
        later = map(FIRST_STAGES.get, self.methods[self.methods.index(trainer.name) + 1 :])
        if group is None or not (self.shared or group in later):
            return
        epochs = [r for r in records if r["event"] == "epoch" and r["method"] == trainer.name]
        records = [{"first_stage_of": trainer.name} | record for record in epochs]
        if distributed.rank() == 0:
            self.folder.mkdir(exist_ok=True)
        save_trainer(self._file(group, trainer.method.stages[0].epochs), trainer, {"records": records})

    def clear(self) -> None:
        """Remove the files if no other run uses them."""
        if not self.shared and distributed.rank() == 0 and self.folder.exists():
            shutil.rmtree(self.folder)
