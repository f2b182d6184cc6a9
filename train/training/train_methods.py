"""The loop over the methods of a run."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..data.dataset import Dataset
from .first_stages import FirstStages
from .progress import Display
from .run_folder import Record, RunFolder
from .stopping import raise_if_stopped
from .trainer import Trainer


def train_methods(
    config: Config,
    data: Dataset,
    folder: RunFolder,
    first_stages: FirstStages,
    display: Display,
    saved: dict[str, Any] | None,
) -> list[Record]:
    """Train the methods one after another and return their results.

    On the CPU the same seed gives the same bits, whether the run was interrupted or not. With several processes, all of them
    train, and rank 0 writes files.

    Args:
        config: the options.
        data: the dataset.
        folder: the run's folder.
        first_stages: first stages that several methods or runs share.
        display: shows the progress.
        saved: the checkpoint to resume from, or None.
    """
    folder.start_records(saved["records"] if saved else [])
    finished = {record["method"] for record in folder.records if record["event"] == "result"}
    for name in config.method.methods:
        if name in finished:
            continue
        raise_if_stopped()  # while the result of the last method was computed
        trainer = Trainer(name, config, data)
        if saved and saved["training"]["name"] == name:
            trainer.load_state_dict(saved["training"])
        elif records := first_stages.load(trainer):
            for record in records:
                folder.append_record(record)
            display.skip(trainer.images)
        trainer.fit(folder, first_stages, display)
        del trainer  # frees its data on the GPU before the next method needs the memory
    first_stages.clear()
    return [record for record in folder.records if record["event"] == "result"]
