"""Tests of the lock of a run's folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import ConfigError
from train.training.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from train.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "r")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError) as refused, locked(tmp_path / "r"):
            pass
        expected = (
            f"--name: expected a run that no other process is writing, got {tmp_path / 'r'}, held by process "
        )
        assert str(refused.value).startswith(f"{expected}{holder.pid} on {platform.node()} since 20")
        holder.kill()
    with locked(tmp_path / "r"):
        assert json.loads((tmp_path / "r" / LOCK).read_text())["process"] == os.getpid()
    assert (tmp_path / "r" / LOCK).read_text() == ""


def test_a_run_holds_its_lock(feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods plain --device cpu"
    short = ["--stage1-epochs", "1", "--stage2-epochs", "0"]
    with locked(tmp_path / "r"):
        assert main([*words.split(), *short]) == 2
        assert main(["ablation", *words.split(), *short, "--seeds", "0"]) == 2
    assert capsys.readouterr().err.count(", held by process ") == 2
    assert main([*words.split(), *short]) == 0
    assert (tmp_path / "r" / "report.html").is_file()


def test_a_lock_is_not_followed_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "r" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="--runs: expected a writable folder"), locked(tmp_path / "r"):
        pass
    assert (tmp_path / "mine").read_text() == "kept"
