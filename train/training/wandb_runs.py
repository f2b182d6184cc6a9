"""Weights & Biases, by its library and its environment variables, such as WANDB_PROJECT and WANDB_MODE=offline."""

from __future__ import annotations

import uuid
from typing import Any

from .trackers import RunTracker


class WandbRuns(RunTracker):
    """Stores each method of a run as a run of Weights & Biases. The methods of a run are a group.

    The library writes its files into the run's folder.
    """

    FILE = "wandb.json"
    _run: Any = None

    def _open(self, method: str, run: str) -> str:
        import wandb  # takes a second, and may not be installed

        self._run = wandb.init(
            id=run or uuid.uuid4().hex,
            name=f"{self._name}/{method}",
            group=self._name,
            config=self._options | {"method": method},
            resume="allow",
            reinit="create_new",  # a program that calls `fit` may have a run of its own
            dir=str(self._folder),
            settings=wandb.Settings(console="off"),  # the progress bar is no log
        )
        return str(self._run.id)

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def _finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
