"""--tensorboard: the event files hold the records of metrics.jsonl, each once, also after a run was resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from train.__main__ import main
from train.checks import fill_in
from train.cli import parse_run
from train.run import load
from train.training.first_stages import FirstStages
from train.training.progress import Display
from train.training.run_folder import RunFolder
from train.training.tensorboard import scalars
from train.training.train_methods import train_methods

SHORT = "--classes-per-batch 3 --stage1-epochs 2 --stage2-epochs 2 --batch-size 50 --device cpu"


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each tag in the event files of one method."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def epochs(folder: Path, method: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == "epoch" and record["method"] == method]


def check(folder: Path, method: str) -> dict[str, list[tuple[int, float]]]:
    """Check that the event files hold exactly the numbers of all epochs, as float32."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in epochs(folder, method):
        for tag, value in scalars(record):
            expected.setdefault(tag, []).append((record["images"], float(np.float32(value))))
    found = events(folder / "tensorboard" / method)
    assert found == expected
    return found


def test_tags_by_hand() -> None:
    record = {
        "event": "epoch",
        "epoch": 3,
        "loss": 0.5,
        "slot_usage": [0.75, 0.25],
        "displacement_norms": [2.0],
    }
    record |= {"accuracy": {"many": 0.5, "few": None}, "accuracy_of": {"both heads": {"few": 1.0}}}
    assert dict(scalars(record)) == {
        "epoch": 3,
        "loss": 0.5,
        "slot_usage/0": 0.75,
        "slot_usage/1": 0.25,
        "displacement_norms/1": 2.0,
        "accuracy/many": 0.5,
        "accuracy_of/both heads/few": 1.0,
    }


def test_events_are_the_records(feature_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "r", "--tensorboard"]) == 0
    found = check(tmp_path / "r", "gist")
    assert len(found["loss"]) == 4
    for tag in ("lr", "loss_balanced", "loss_random", "images_per_second", "tau_balanced", "tau_random"):
        assert len(found[tag]) == 4
    assert len(found["slot_usage/4"]) == len(found["displacement_norms/4"]) == 2  # of the second stage
    assert {"accuracy/overall", "accuracy/many", "accuracy/medium", "accuracy/few"} <= found.keys()
    assert "slot_usage/0" not in check(tmp_path / "r", "plain")
    assert main([*args, "--name", "without"]) == 0
    assert not (tmp_path / "without" / "tensorboard").exists()
    for model in ("model-gist.safetensors", "model-plain.safetensors"):
        assert (tmp_path / "r" / model).read_bytes() == (tmp_path / "without" / model).read_bytes()


def test_a_resumed_run_shows_each_epoch_once(feature_file: Path, tmp_path: Path) -> None:
    """Stopped between two checkpoints, so that an epoch is trained again; then resumed with and without the option."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = f"--recipe features --data {feature_file} --runs {tmp_path} --name r {SHORT}".split()
    config = parse_run([*args, "--tensorboard"])
    data = load(config)
    config = fill_in(config, data)
    console = Console(quiet=True)

    class Stopped(RunFolder):
        """Fails after its third epoch, whose record is written, but not its checkpoint."""

        def save_checkpoint(self, *args: Any, **options: Any) -> None:
            if len(self.records) == 3:
                raise InterruptedError
            super().save_checkpoint(*args, **options)

    folder = Stopped(config)
    folder.path.mkdir()
    folder.open(config, data)
    with Display(console, 1, 0) as display, pytest.raises(InterruptedError):
        train_methods(config, data, folder, FirstStages(tmp_path, config, ""), display, None)
    assert len(check(tmp_path / "r", "gist")["loss"]) == 3

    assert main([*args, "--resume", "--tensorboard"]) == 0
    assert len(check(tmp_path / "r", "gist")["loss"]) == 4
    assert len(check(tmp_path / "r", "plain")["loss"]) == 4
    # A run may be resumed with or without the option, and the event files hold all of its records.
    before = events(tmp_path / "r" / "tensorboard" / "plain")
    assert main([*args, "--resume"]) == 0
    assert events(tmp_path / "r" / "tensorboard" / "plain") == before
    assert main([*args, "--resume", "--tensorboard"]) == 0
    check(tmp_path / "r", "gist")
    assert "tensorboard" not in (tmp_path / "r" / "config.toml").read_text()


def test_a_missing_tensorboard_is_named(
    feature_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    args = f"--recipe features --data {feature_file} --runs {tmp_path / 'runs'} {SHORT}".split()
    assert main([*args, "--tensorboard"]) == 2
    message = capsys.readouterr().err
    assert "--tensorboard: expected the package, which `pip install tensorboard` brings" in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert main([*args, "--methods", "plain"]) == 0
