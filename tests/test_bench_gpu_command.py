"""The command `python -m bench.gpu` without a GPU: arguments, its budget, the parts that it runs, its status."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_parts

from .clock import Clock

# The budget and the parts


def test_parts_share_the_time_and_pass_on_what_they_leave() -> None:
    clock = Clock()
    budget = gpu.Budget(8, ["build", "test", "sanitize", "bench"], clock)
    assert budget.seconds("build") < 0.35 * 480
    clock.now = 60.0
    test = budget.seconds("test")
    clock.now += test
    clock.now += budget.seconds("sanitize")
    assert budget.seconds("bench") == pytest.approx(480 - clock.now)
    assert budget.seconds("bench") > 160
    assert gpu.Budget(1, ["bench"], Clock()).seconds("bench") == 60


def test_pytests_last_line_is_counted() -> None:
    assert gpu_parts._counts("x\n=== 3 failed, 10 passed, 2 errors in 2.31s ===\n") == {
        "failed": 3,
        "passed": 10,
        "error": 2,
    }
    assert gpu_parts._counts("Traceback") == {}


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", None),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 2 errors", "ERROR SUMMARY: 2 errors"),
        (1, "Device not supported", "ended with 1 and no summary"),
        (None, "", "stopped after 7 s"),
    ],
)
def test_the_sanitizers_summary_is_read(code: int | None, output: str, problem: str | None) -> None:
    run = gpu_parts._sanitized(gpu_parts.Done(code, output, 1.0), 7.0)
    assert run.get("problem") == problem


def test_without_the_sanitizer_the_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "find_sanitizer", lambda: None)
    assert "compute-sanitizer was found neither" in gpu_parts.sanitize(9.0, ["cuda"])["not run"]


def test_a_command_ends_in_its_time() -> None:
    begin = time.monotonic()
    done = gpu_parts.command(
        [sys.executable, "-c", "import time; print('a', flush=True); time.sleep(60)"], 1.5
    )
    assert done.code is None
    assert done.output.startswith("a")
    assert time.monotonic() - begin < 30


# The command


def test_without_a_gpu_it_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "build,dance"], "expected some of build, test, sanitize, bench, got 'dance'"),
        (["--minutes", "-1"], "expected a positive number of minutes, got '-1'"),
        (["--minutes", "nan"], "expected a positive number of minutes, got 'nan'"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_output_is_named_after_gpu_and_day() -> None:
    path = gpu.default_output("NVIDIA H100 80GB HBM3")
    assert path.parent.parts[-2:] == ("bench", "results")
    assert path.name.startswith("nvidia-h100-80gb-hbm3-2")
    assert path.suffix == ".json"
    assert gpu.parts("bench,build") == ["build", "bench"]


def test_problems_end_in_a_status_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "run_tests", lambda seconds: {"problem": "3 failed"})
    argv = ["--device", "cpu", "--only", "test", "--output", str(tmp_path / "x.json")]
    assert gpu.main(argv) == 1
    assert "PROBLEM, test: 3 failed" in capsys.readouterr().err
    monkeypatch.setattr(gpu_parts, "run_tests", lambda seconds: {})
    assert gpu.main(argv) == 0
