"""Tests of SIGTERM and SIGINT: the first writes a checkpoint after the current step, the second ends the run at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train.training.stopping import Stopped, handle_signals, stop_requested, training

from ...processes import in_group
from .test_checkpoint import start

TWICE = """
import signal
from train.training.stopping import handle_signals, stop_requested, training
with handle_signals(), training():
    signal.raise_signal(signal.SIGTERM)
    print(stop_requested(), flush=True)
    signal.raise_signal(signal.SIGINT)
    print("not reached")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training_ends_the_run(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with handle_signals(), pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
        signal.raise_signal(number)
    assert stopped.value.exit_code == {"SIGTERM": 143, "SIGINT": 130}[number.name]
    assert signal.getsignal(number) is before


def test_a_signal_in_training_is_recorded() -> None:
    with handle_signals(), training():
        assert not stop_requested()
        signal.raise_signal(signal.SIGINT)
        assert stop_requested() == signal.SIGINT
    with handle_signals():
        assert not stop_requested()


def test_a_second_signal_ends_the_process_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == f"{signal.SIGTERM.value}\n"
    assert "a second signal ends the run without a checkpoint" in ended.stderr


def _one_of_two_is_stopped(rank: int) -> None:
    with handle_signals(), training():
        assert not stop_requested()
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # as torchrun passes it on
        assert stop_requested() == signal.SIGTERM


def test_all_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    in_group(_one_of_two_is_stopped, 2, tmp_path)


def test_a_run_that_is_stopped_has_saved_its_last_step(tmp_path: Path) -> None:
    """SIGTERM, then SIGINT for the resumed run, each while an endless run trains."""
    endless = ("--stage1-epochs", "1000000", "--methods", "plain", "--checkpoint-steps", "1")
    checkpoint, images = tmp_path / "r" / "checkpoint.pt", 0
    for number, code, more in ((signal.SIGTERM, 143, ()), (signal.SIGINT, 130, ("--resume",))):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(tmp_path, "r", *endless, *more)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == code, output
        position = torch.load(checkpoint, weights_only=True)["training"]["position"]
        assert position["images"] > images
        images = position["images"]
        line = f"stopped by {number.name} in plain, after {images:,} images; the same command with --resume continues"
        assert line in output.splitlines()
        assert "Traceback" not in output
