"""Runs with --shard-classes by torchrun: killed at any moment, and resumed with other numbers of processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .test_micro_batches import ran

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
#: Seconds within which the processes end whose peer was killed: torchrun waits 30 before it kills them.
SECONDS_TO_END = 300


def command(processes: int, name: str, options: list[str], *more: str) -> list[str]:
    launcher = [*LAUNCHER, "--nproc-per-node", str(processes)] if processes > 1 else [sys.executable]
    return [*launcher, "-m", "train", "--name", name, *options, *more]


def kill(process: subprocess.Popen[str], *, one: bool) -> None:
    """Kill one process that torchrun started, or torchrun with all of them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for pid in [process.pid, *map(int, children)] if not one else map(int, children[-1:]):
        os.kill(pid, signal.SIGKILL)


def run_and_kill(words: list[str], checkpoint: Path, delay: float, *, one: bool) -> bool:
    """Start a run and kill it some seconds after its next checkpoint; return whether it was still running."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
        time.sleep(0.002)
    time.sleep(delay)
    running = process.poll() is None
    if running:
        kill(process, one=one)
    output, _ = process.communicate(timeout=SECONDS_TO_END)
    assert running or process.returncode == 0, output[-3000:]
    return running


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_with_other_numbers_of_processes(
    feature_file: Path, tmp_path: Path, seed: int
) -> None:
    options = f"--recipe features --data {feature_file} --num-classes 5 --classes-per-batch 3 --batch-size 51 --threads 1"
    options += (
        " --stage1-epochs 2 --stage2-epochs 3 --device cpu --methods cos-gist gist --checkpoint-steps 1"
    )
    options += " --optimizer adamw --lr 1e-3 --clip-gradient-norm 1 --label-smoothing 0.1 --ema-decay 0.5 --keep best --hold-out 0.2"
    words = [*options.split(), "--shard-classes", "--runs", str(tmp_path)]
    ran(command(1, "whole", words))
    chance = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = 0
    for processes, one in ((2, True), (3, False), (2, False)):
        more = ["--resume"] if kills else []
        delay = chance.uniform(0.0, 0.4)
        kills += run_and_kill(
            command(processes, "killed", words, *more), killed / "checkpoint.pt", delay, one=one
        )
        saved = torch.load(killed / "checkpoint.pt", weights_only=True)["training"]
        assert (killed / saved["head_folder"] / ".metadata").exists()
    assert kills, "no run was killed, so nothing was tested"
    assert "warning: the report is incomplete" not in ran(command(4, "killed", words, "--resume"))

    again = subprocess.run(
        command(2, "killed", words, "--resume", "--lr", "0.1"), capture_output=True, text=True, check=False
    )
    assert again.returncode
    assert (
        again.stderr.count("error: --lr: expected") == 1
    )  # rank 0 prints it, and the others do not fail on their own
    assert "Connection closed" not in again.stderr

    assert {path.name for path in killed.iterdir() if "head" not in path.name} == {
        path.name for path in whole.iterdir() if "head" not in path.name
    }
    assert len(list(killed.glob("checkpoint-head-*"))) == 1
    for found, expected in zip(records(killed), records(whole), strict=True):
        assert (found["event"], found["method"]) == (expected["event"], expected["method"])
        if "loss" in expected:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found.get("accuracy_of", {}).keys() == expected.get("accuracy_of", {}).keys()
        assert found["accuracy"]["overall"] == pytest.approx(expected["accuracy"]["overall"], abs=0.03)
    for method in ("cos-gist", "gist"):
        found, expected = (load_file(run / f"model-{method}.safetensors") for run in (killed, whole))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
