"""Tests of `pytest bench/`: rounds, tables, options, and every timed case at a small size."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.cpu import report
from bench.cpu.memory import peak_in_new_process
from bench.cpu.pairs import FEW, LEAST, MOST, Pairs, Pedantic, TooSlow, measure, rounds
from bench.cpu.precisions import in_precision, tensors
from bench.problem import MAIN, Size, parse_sizes

from .clock import Clock

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [(1e-6, MOST), (0.02, 50), (0.5, LEAST), (1.0, LEAST), (1.1, FEW), (5.0, FEW), (5.1, 0)],
)
def test_rounds_in_a_second(pair: float, expected: int) -> None:
    assert rounds(pair, 1.0) == expected
    assert rounds(2 * pair, 2.0) == expected


def by(clock: Clock) -> Pedantic:
    """Return what pytest-benchmark does, by another clock. It is disabled where tests run side by side."""

    def pedantic(run: Callable[[], Any], setup: Callable[[], None], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            setup()
            begin = clock()
            run()
            times.append(clock() - begin)
        return times

    return pedantic


def test_pairs_alternate_and_first_calls_do_not_count() -> None:
    clock, order = Clock(), []
    durations = {"baseline": iter([9.0, 5.0, *[2.0] * 99]), "run": iter([2.0, 5.0, 1.0, 4.0, *[3.0] * 97])}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.now += next(durations[name])

        return run

    found = measure(call("run"), call("baseline"), 15.0, by(clock), clock)
    assert found == Pairs(1.5, 3.0, 5)
    assert order == ["baseline", "run"] * 7
    assert str(found) == "1.50 (3e+03 ms; 5)"


def test_cases_that_are_too_slow_end_after_one_call() -> None:
    clock = Clock()
    with pytest.raises(TooSlow, match=r"left out: a call takes 25\.0 s, the baseline 6\.0 s"):
        measure(clock.takes(25.0), clock.takes(6.0), 6.0, by(clock), clock)
    assert clock.now == 31.0


def test_a_slow_second_pair_still_gets_a_median() -> None:
    clock, slow = Clock(), iter([1.0, *[50.0] * 99])

    def run() -> None:
        clock.now += next(slow)

    assert measure(run, clock.takes(1.0), 10.0, by(clock), clock) == Pairs(50.0, 50.0, FEW)


def test_tables_and_the_rows_of_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "processor", lambda: "Abacus")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "__version__", "9.9")
    tables = report.Tables()
    assert tables.lines() == []
    tables.add("Beads", "sum", "3×4", "– (left out)")
    tables.add("Beads", "product", "5×6", Pairs(0.5, 0.002, 7))
    assert tables.lines() == [
        *("", "Beads", ""),
        *("| | 3×4 | 5×6 |", "|---|---|---|"),
        "| sum | – (left out) | – |",
        "| product | – | 0.50 (2 ms; 7) |",
    ]
    tables.add(report.GLANCE, "forward", "3×4", Pairs(1.234, 0.002, 40))
    tables.add(report.GLANCE, "forward", "5×6", Pairs(0.987, 2.0, 5))
    tables.add(report.GLANCE, "loss", "3×4", "– (left out)")
    expected = [
        "| **Abacus**, 2 threads, torch 9.9, 2026-02-03, n = 5 to 40 | | |",
        "| forward | 1.23 | 0.99 |",
        "| loss | – | – |",
    ]
    assert report.glance_rows(tables.tables[report.GLANCE], date(2026, 2, 3)) == expected
    assert tables.lines()[-2:] == expected[1:]


def test_sizes_are_read_as_they_are_written() -> None:
    for size in (MAIN, Size(3, 5, 7, 0), Size(1, 2, 3, 16)):
        assert Size.parse(size.text) == size
    assert parse_sizes("3x5x7,1x2x3x8") == (Size(3, 5, 7), Size(1, 2, 3, 8))
    with pytest.raises(argparse.ArgumentTypeError, match=r"--sizes: expected BxKxd .*, got '3x4'"):
        parse_sizes("3x5x7,3x4")


def test_precisions() -> None:
    size = Size(3, 5, 8)
    x, w, *_ = tensors(size, "bfloat16")
    assert {x.dtype, w.dtype, F.linear(x, w).dtype} == {torch.bfloat16}
    x, w, *_ = tensors(size, "autocast")
    assert {x.dtype, w.dtype} == {torch.float32}
    assert in_precision(F.linear, "autocast")(x, w).dtype == torch.bfloat16
    assert in_precision(F.linear, "float32") is F.linear


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Linux rounds VmRSS for each processor that a process runs on
    size = Size(256, 65536, 16)
    logits = 4 * size.B * size.K  # the call allocates nothing else that is large
    assert peak_in_new_process("linear", "forward", size) == pytest.approx(logits, rel=0.1)
    with pytest.raises(RuntimeError, match=r"code 1; `python -m bench\.cpu\.memory 'none' loss 2x3x4` shows"):
        peak_in_new_process("none", "loss", Size(2, 3, 4))


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench", *arguments]
    # A process of its own: pytest-benchmark would disable itself in a worker of xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=inherited | {"COLUMNS": "999"}
    )
    return done.stdout + done.stderr


def test_every_timed_case_at_small_sizes() -> None:
    """The compiled forms are left out, whose compilation takes a minute; so is memory, which has a test of its own."""
    said = bench("--sizes", "9x70x16,3x8x5x2", "--seconds", "0.3", "-k", "not compiled and not peak")
    assert re.search(r"\d+ passed", said), said
    assert not re.search(r"\d+ (failed|error)", said), said
    for title in (
        "Host overhead",
        "Logits of small batches",
        "rotations",
        "sub-centers",
        "float16",
        "top 10",
    ):
        assert title in said, said
    rows = said[said.index("The rows of the first table of docs/performance.md") :]
    assert re.search(
        rf"\| \*\*.+\*\*, \d+ threads, torch {re.escape(torch.__version__)}, \d{{4}}-\d\d-\d\d, n = \d+ to \d+ \| \| \|",
        rows,
    )
    for kind in ("forward", "loss and backward"):
        for precision in ("float32", "bfloat16", "autocast"):
            assert re.search(
                rf"\| {kind}, {precision} \| (\d+\.\d\d|–[^|]*) \| (\d+\.\d\d|–[^|]*) \|", rows
            ), rows


def test_options_are_documented() -> None:
    said = bench("--help")
    assert "--sizes" in said
    assert "256x100000x512" in said
    assert "2048x8142x1024 for F.linear_cross_entropy" in said
    assert "--seconds" in said
