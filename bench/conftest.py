"""Options, paired timing and tables of `pytest bench/`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gistops.backends import native

from .cpu.logits import SIZES
from .hardware import hardware
from .problem import Size

#: Returns the ratio, milliseconds and the number of pairs: see the fixture `paired`.
Paired = Callable[..., tuple[float, float, int]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gistops")
    group.addoption(
        "--sizes",
        default=None,
        help="comma-separated BxKxd or BxKxdxm; default: " + ", ".join(map(str, SIZES)),
    )
    group.addoption("--seconds", type=float, default=5.0, help="time per row of a table (at least 3 rounds)")


class Tables:
    """The results: table -> row -> column -> text."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, str]]] = {}

    def add(self, table: str, row: str, column: str, value: str) -> None:
        self.tables.setdefault(table, {}).setdefault(row, {})[column] = value


TABLES = pytest.StashKey[Tables]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = Tables()


def sizes(config: pytest.Config) -> tuple[Size, ...]:
    chosen = config.getoption("--sizes")
    return tuple(Size.parse(text) for text in chosen.split(",")) if chosen else SIZES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", sizes(metafunc.config), ids=str)


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> Tables:
    return request.config.stash[TABLES]


@pytest.fixture(scope="session", autouse=True)
def require_compiled_ops() -> None:
    status = native.load()
    assert status.loaded, f"the compiled ops are not available: {status.reason}"


@pytest.fixture
def paired(benchmark: Any, request: pytest.FixtureRequest) -> Paired:
    """Return a function that times a call in pairs with a baseline call.

    pytest-benchmark times `run`, and each round times `baseline` just before. Both calls of a pair see the same state of
    the machine, so that the median ratio of the pairs is reliable even if the times themselves are not. The function
    returns this ratio, the median time of `run` in milliseconds, and the number of pairs.
    """
    seconds: float = request.config.getoption("--seconds")

    def measure(run: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[float, float, int]:
        for function in (baseline, run):  # the first calls compile and allocate
            function()
        begin = time.perf_counter()
        baseline()
        run()
        rounds = min(max(3, int(seconds / (time.perf_counter() - begin))), 200)
        baselines: list[float] = []

        def setup() -> None:
            begin = time.perf_counter()
            baseline()
            baselines.append(time.perf_counter() - begin)

        benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        times: list[float] = benchmark.stats.stats.data
        ratio = statistics.median(a / b for a, b in zip(times, baselines[-rounds:], strict=True))
        benchmark.extra_info["ratio to F.linear"] = ratio
        return ratio, statistics.median(times) * 1e3, rounds

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tables = config.stash[TABLES].tables
    if not tables:
        return
    write = terminalreporter.write_line
    write("")
    capability = torch.ops.gistops.cpu_capability().replace("\n", "; ")
    write(f"{hardware()}, kernels {capability}; n = rounds, each paired with F.linear")
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
        write(f"\n{title}\n")
        write("| | " + " | ".join(columns) + " |")
        write("|---|" + "---|" * len(columns))
        for row, cells in table.items():
            write(f"| {row} | " + " | ".join(cells.get(column, "–") for column in columns) + " |")
