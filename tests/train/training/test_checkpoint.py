"""Resuming: a run that is killed at any moment reaches bitwise the same weights, and leaves complete files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = {
    "recipe": "smoke",
    "stage1-epochs": "2",
    "stage2-epochs": "2",
    "max-steps-per-epoch": "6",
    "checkpoint-steps": "2",
    "threads": "1",
    "device": "cpu",
}
#: Options that add random numbers, averages and the weights of the best epoch to the state of a run.
FINE_TUNING = "--methods gist --mixup 0.2 --cutmix 1 --ema-decay 0.8 --keep best --patience 3 --hold-out 0.1"


def start(runs: Path, name: str, *more: str) -> subprocess.Popen[str]:
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "train", *options, "--runs", str(runs), "--name", name, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key != "seconds" and not key.endswith("images_per_second")
        }
        for line in lines
    ]


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors in nested dictionaries and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {name: found for key, item in items for name, found in tensors(item, f"{path}/{key}").items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    output = finish(start(runs, "whole"))
    assert "overall" in output
    return runs / "whole"


@pytest.mark.parametrize(
    ("options", "most_kills"), [("", 8), (FINE_TUNING, 2)], ids=["default", "fine-tuning"]
)
def test_killed_and_resumed(options: str, most_kills: int, whole: Path, tmp_path: Path, seed: int) -> None:
    more = options.split()
    if more:
        finish(start(tmp_path, "whole", *more))
        whole = tmp_path / "whole"
    chance = random.Random(seed)
    folder = tmp_path / "killed"
    kills = 0
    for _ in range(most_kills):
        process = start(tmp_path, "killed", *more, *(["--resume"] if kills else []))
        deadline = time.monotonic() + chance.uniform(0.0, 0.4)
        before = (folder / "checkpoint.pt").stat().st_mtime_ns if (folder / "checkpoint.pt").exists() else 0
        while process.poll() is None:  # kill it some time after its first checkpoint, at an arbitrary moment
            checkpoint = folder / "checkpoint.pt"
            moved = checkpoint.exists() and checkpoint.stat().st_mtime_ns != before
            if not moved:
                deadline = time.monotonic() + chance.uniform(0.0, 0.4)
            elif time.monotonic() > deadline:
                process.kill()
            time.sleep(0.002)
        output = process.communicate()[0]
        assert process.returncode in (0, -9), output[-3000:]
        if process.returncode == 0:
            break
        kills += 1
        torch.load(folder / "checkpoint.pt", weights_only=True)  # complete, and safe to load
    else:
        finish(start(tmp_path, "killed", *more, "--resume"))
    assert kills, "the run ended before it was killed, so nothing was tested"

    models, found = ({file.name for file in run.glob("model-*.safetensors")} for run in (whole, folder))
    assert models == found != set()
    for model in models:
        expected, value = load_file(whole / model), load_file(folder / model)
        assert expected.keys() == value.keys()
        assert all(torch.equal(expected[name], value[name]) for name in expected), model
    states = [
        tensors(torch.load(run / "checkpoint.pt", weights_only=True)["training"]) for run in (whole, folder)
    ]
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different
    assert metrics(folder) == metrics(whole)
    assert (
        not list(folder.glob(".*.tmp")) or kills
    )  # a kill may leave an incomplete temporary file, never an incomplete file


def test_a_run_is_not_written_over_nor_resumed_with_other_options(whole: Path) -> None:
    again = start(whole.parent, "whole")
    output = again.communicate()[0]
    assert again.returncode == 2
    assert "--name: expected a new run" in output
    assert "Traceback" not in output
    other = start(whole.parent, "whole", "--resume", "--lr", "0.01")
    output = other.communicate()[0]
    assert other.returncode == 2
    assert "--lr: expected 0.1" in output


def test_what_a_run_leaves(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    expected = {"accuracy.png", "checkpoint.pt", "config.toml", "metrics.jsonl"}
    assert expected | {"model-gist.safetensors", "model-plain.safetensors"} <= names
    assert (whole / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    results = {line["method"]: line for line in metrics(whole) if line["event"] == "result"}
    assert results["gist"]["images"] == results["plain"]["images"]
    assert sum(results["gist"]["slot_usage"]) == pytest.approx(1)
    assert len(results["gist"]["slot_usage"]) == 5
    assert set(results["gist"]["accuracy"]) == {"overall", "many", "medium", "few"}
