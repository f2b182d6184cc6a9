"""A run's folder. A process killed at any moment leaves every file in it whole, or as it was before.

But for lines at the end of metrics.jsonl and TensorBoard's logs, which a resumed run writes anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch

from .. import distributed
from ..config import Config, ConfigError
from ..files import write_atomically
from ..options import Mark
from ..recipes import load_recipe
from .tensorboard import Board


class RunFolder:
    """`runs/<name>/`: config.toml, metrics.jsonl, checkpoint.pt, and what the run ends with; tensorboard/ if asked for."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.runs) / config.run.name
        self.config_file = self.path / "config.toml"
        self.checkpoint_file = self.path / "checkpoint.pt"
        self.metrics_file = self.path / "metrics.jsonl"
        logs = config.run.tensorboard and distributed.rank() == 0
        self.board = Board(self.path / "tensorboard") if logs else None

    def open(self, config: Config, data_fingerprint: str) -> dict[str, Any] | None:
        """Make the folder ready; returns the checkpoint to go on from, or None to begin.

        Raises:
            ConfigError: it would write over another run, or resume one with other options or data.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("name", "a folder", f"{self.path}, which is a file")
        if not config.run.resume and self.path.exists() and self._begun():
            advice = "give another --name, or --resume to go on with it"
            raise ConfigError("name", "a new run", f"{self.path}, which is there already; {advice}")
        saved = self._load_checkpoint()
        if saved and self.config_file.exists():
            self._check_same(config)
        if saved and saved["data"] != data_fingerprint:
            expected = f"the data that the run began with ({saved['data']})"
            raise ConfigError("data", expected, f"{config.data.data} ({data_fingerprint})")
        self._data = data_fingerprint
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                "runs", "a folder that can be written", f"{config.run.runs} ({error})"
            ) from None
        values = {name: value for name, value in config.recorded().items() if value is not None}
        text = (
            f"# From the recipe {config.run.recipe}. `--recipe` takes this file too.\n{tomli_w.dumps(values)}"
        )
        self.write(self.config_file.name, lambda path: path.write_text(text))
        return saved

    def _begun(self) -> bool:
        """Whether there is more than a run leaves that ended before its first epoch."""
        left = {"config.toml", "metrics.jsonl", "tensorboard"}
        empty = not self.metrics_file.exists() or self.metrics_file.stat().st_size == 0
        return not empty or any(entry.name not in left for entry in self.path.iterdir())

    def _check_same(self, config: Config) -> None:
        before, now = load_recipe(str(self.config_file)).recorded(), config.recorded()
        for option in sorted(now.keys() - config.marked(Mark.CHANGEABLE)):
            if before[option] != now[option]:
                expected = f"{before[option]!r} as in {self.config_file}, which is to be resumed"
                raise ConfigError(option, expected, repr(now[option]))

    def _load_checkpoint(self) -> dict[str, Any] | None:
        if not self.checkpoint_file.exists():
            return None
        saved: dict[str, Any] = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
        return saved

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` make the file `name`, whole or not at all; in the first process alone."""
        if distributed.rank() == 0:
            write_atomically(self.path / name, write)

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.write(
            self.checkpoint_file.name, lambda path: torch.save({**checkpoint, "data": self._data}, path)
        )

    def restart_metrics(self, records: list[dict[str, Any]]) -> None:
        """Make metrics.jsonl hold these records: what came after the checkpoint comes again."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.write(self.metrics_file.name, lambda path: path.write_text(text))
        if self.board:
            self.board.restart(records)

    def append_metrics(self, record: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps(record) + "\n")
            if self.board:
                self.board.append(record)
