"""Tests of the concurrent jobs of `python -m bench.gpu`: tests, sanitizers, training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import concurrent_jobs, ncu
from bench.gpu.output import Logs
from bench.gpu.subprocesses import ROOT, CommandResult
from bench.problem import Size


def test_counts_of_pytest_are_parsed() -> None:
    said = "x\n=== 3 failed, 10 passed, 2 errors in 2.31s ===\n"
    assert concurrent_jobs.parse_pytest_counts(said) == {"failed": 3, "passed": 10, "error": 2}
    assert concurrent_jobs.parse_pytest_counts("Traceback") == {}


def test_each_backend_has_its_own_pytest() -> None:
    asked = concurrent_jobs.pytest_arguments("cuda", ["cuda", "triton"])
    assert asked["operators, cuda"][-2:] == ["-k", "not triton"]
    assert asked["operators, triton"][-2:] == ["-k", "triton"]
    assert "tests/nn" in asked["heads"]
    assert asked["large"][-2:] == ["-m", "large"]
    assert (ROOT / asked["training"][0]).is_file()
    assert "-k" not in concurrent_jobs.pytest_arguments("cpu", ["cpu"])["operators, cpu"]


def test_a_pytest_run_is_reported(tmp_path: Path) -> None:
    test = tmp_path / "test_some.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert False\n", encoding="utf-8")
    logs = Logs(tmp_path)
    found = concurrent_jobs.run_pytest("some", [str(test)], 1, 600.0, logs)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert found["problem"] == "1 failed"
    assert "test_b" in found["failures"][0]
    assert "1 failed, 1 passed" in logs.text()


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", None),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 2 errors", "ERROR SUMMARY: 2 errors"),
        (1, "Device not supported", "ended with 1 and no summary"),
        (None, "", "stopped after 7 s"),
    ],
)
def test_the_summary_of_a_sanitizer_is_parsed(code: int | None, output: str, problem: str | None) -> None:
    run = concurrent_jobs.parse_sanitizer(CommandResult(code, output, 1.0), 7.0)
    assert run.get("problem") == problem


def test_finished_models_are_parsed() -> None:
    assert concurrent_jobs.parse_models('epoch 1\n{"seed": 0, "accuracy": 0.4}\n{broken\n') == [
        {"seed": 0, "accuracy": 0.4}
    ]


def test_jobs_run_concurrently_and_a_failure_hides_no_result() -> None:
    barrier = threading.Barrier(2, timeout=300)

    def meet() -> dict[str, Any]:
        barrier.wait()
        return {"counts": {"passed": 1}}

    def fail() -> dict[str, Any]:
        barrier.wait()
        raise RuntimeError("no")

    document: dict[str, Any] = {"parts": {}}
    jobs: list[concurrent_jobs.Job] = [("test", "a", meet), ("test", "b", fail)]
    concurrent_jobs.run_concurrently(jobs, document, lambda: None)
    assert document["parts"]["test"]["runs"]["a"] == {"counts": {"passed": 1}}
    assert document["parts"]["test"]["problem"] == "b: RuntimeError: no"


def test_the_table_of_ncu_is_extracted(tmp_path: Path) -> None:
    program = tmp_path / "ncu"
    lines = ["==PROF== Connected", '"ID","Kernel Name"', '"0","norms_kernel"', "==PROF== Disconnected"]
    body = "\n".join(f"echo '{line}'" for line in lines)
    program.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    program.chmod(0o755)
    size = Size(2, 3, 4)
    text, run = ncu.profile(program, "cuda", "step", size, 200.0, tmp_path / "log")
    assert text == '"ID","Kernel Name"\n"0","norms_kernel"\n'
    assert "not run" not in run
