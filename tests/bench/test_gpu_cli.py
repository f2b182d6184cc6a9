"""Tests of `python -m bench.gpu` without a GPU: budget, arguments, a whole session on tiny sizes, kills."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import cli, session, subprocesses
from bench.gpu.budget import PARTS, Budget
from bench.gpu.subprocesses import ROOT
from gistops.backends import native

from .clock import Clock

# The budget and the parts


def test_later_parts_get_the_time_that_a_part_leaves() -> None:
    clock = Clock()
    budget = Budget(8, list(PARTS), clock)
    assert 40 < budget.seconds("build") < 70
    clock.now = 5.0
    clock.now += budget.seconds("smoke")
    assert budget.seconds("measure") > 120
    clock.now += budget.seconds("measure")
    assert budget.seconds("test") == budget.seconds("sanitize") == budget.seconds("train")  # concurrent
    assert 230 < budget.seconds("train") < 480 - clock.now
    assert Budget(1, ["measure"], Clock()).seconds("measure") == pytest.approx(60, abs=5)


def test_shares_of_parts_add_up() -> None:
    budget = Budget(4, ["constants", "measure", "profile"], Clock())
    shares = [budget.share(part, "constants") for part in ("constants", "measure", "profile")]
    assert sum(shares) == pytest.approx(budget.left())
    assert shares[1] > 5 * shares[2]


# The command


def test_without_a_gpu_the_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "build,dance"], "expected some of build, smoke, constants, measure"),
        (["--minutes", "-1"], "expected a positive number of minutes, got '-1'"),
        (["--minutes", "nan"], "expected a positive number of minutes, got 'nan'"),
        (["--variants", "cuda,tritn*"], "no variant is named 'tritn*'"),
        (["--cases", "bf16:forwards"], "expected bf16, float32, tf32, forward, step, loss, topk, or a size"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_default_output_is_out_or_named_after_gpu_and_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    path = cli.default_output("NVIDIA H100 80GB HBM3")
    assert path.parent.parts[-2:] == ("bench", "results")
    assert path.name.startswith("nvidia-h100-80gb-hbm3-2")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert cli.default_output("NVIDIA H100 80GB HBM3") == tmp_path
    assert cli.parts("measure,build") == ["build", "measure"]
    assert "train" in cli.arguments(["--day"]).only
    assert "train" not in cli.arguments([]).only


def test_problems_give_exit_status_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session.Session, "build", lambda self, seconds: {"problem": "no compiler"})
    argv = ["--device", "cpu", "--only", "build", "--output", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "PROBLEM, build: no compiler" in capsys.readouterr().err
    monkeypatch.setattr(session.Session, "build", lambda self, seconds: {})
    assert cli.main(argv) == 0


# A session


TINY = ["--day", "--device", "cpu", "--variants", "cpu,direct,cuda", "--cases", "bf16:256x8142x2048"]


def session_command(folder: Path, *more: str, minutes: float = 15.0) -> list[str]:
    return subprocesses.python_command(
        "-m", "bench.gpu", *TINY, "--output", str(folder), "--minutes", str(minutes), *more
    )


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (folder / "table.md").read_text(encoding="utf-8").startswith("# gistops on ")
    assert {path.name for path in folder.iterdir()} <= {
        *(
            "result.json",
            "table.md",
            "kernels.csv",
            "ncu.csv",
            "build.log",
            "tests.log",
            "sanitize.log",
            "runs.tgz",
        )
    }
    return document


def test_a_session_runs_on_a_cpu(tmp_path: Path) -> None:
    assert native.load().loaded  # compiles before the session, whose time limit is too short
    only = "build,smoke,constants,measure,profile,ncu,sanitize"
    done = subprocess.run(
        session_command(tmp_path, "--only", only), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = read(tmp_path)
    assert set(document["parts"]) == set(only.split(","))
    assert document["out"] == {}
    assert "cuda" in document["absent"]
    assert document["constants"]["copy"]["value"] > 0
    assert [result["case"]["kind"] for result in document["cases"]] == ["forward", "step", "loss", "topk"]
    assert all(result["variants"]["cpu"]["roofline"] > 0 for result in document["cases"])
    assert document["rule"]["bf16 forward"]["winner"] == "cpu"
    assert document["rule"]["tf32 forward"] == {"none": "nothing was measured"}
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open(encoding="utf-8")))
    assert {row["kind"] for row in rows} == {"forward", "step", "loss", "topk"}
    assert "available" in (tmp_path / "build.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_at_any_moment_leaves_the_results(tmp_path: Path, how: signal.Signals, seed: int) -> None:
    asked = session_command(tmp_path, "--only", "constants,measure,test")
    process = subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "result.json").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.Random(seed).uniform(0, 8))
    finally:
        process.send_signal(how)
        status = process.wait(300)
    document = read(tmp_path)
    assert document["options"]["only"] == ["constants", "measure", "test"]
    if how == signal.SIGTERM:
        assert status == 143
        assert document["seconds"] > 0


def test_children_of_a_command_end_with_it(tmp_path: Path) -> None:
    done = subprocesses.run_command(["sh", "-c", "sleep 1000 & echo $! $$; wait"], 3.0, tmp_path / "log")
    assert done.code is None
    child, parent = map(int, done.output.split())
    with pytest.raises(ProcessLookupError):
        os.kill(parent, 0)
    for _ in range(3000):  # it has its signal, and ends as soon as it is scheduled
        if not is_running(child):
            break
        time.sleep(0.01)
    assert not is_running(child)
    assert os.path.exists(tmp_path / "log")


def is_running(process: int) -> bool:
    """Return whether a process runs; one that has ended may wait for its new parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
