"""Options, paired timing and tables of `pytest bench/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gistops.backends import native

from .cpu import pairs
from .cpu.logits import SIZES
from .cpu.report import Tables
from .hardware import hardware
from .problem import FAIR, MAIN, Size, parse_sizes

#: Measures a case and writes its cell: see the fixture `compare`.
Compare = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gistops")
    group.addoption(
        "--sizes",
        type=parse_sizes,
        default=SIZES,
        help="comma-separated BxKxd or BxKxdxm of all tables but that of the host overhead; tables of one size take "
        f"{MAIN.text} if it is among these, otherwise the first. Default: {','.join(s.text for s in SIZES)}, and "
        f"{FAIR.text} for F.linear_cross_entropy",
    )
    group.addoption(
        "--seconds",
        type=float,
        default=0.7,
        help=f"time per cell of a table. A cell has at least {pairs.LEAST} rounds, or {pairs.FEW} if one takes longer "
        f"than this time; if one takes over {pairs.TOO_LONG} times as long, the cell is left out. Default: %(default)s",
    )


TABLES = pytest.StashKey[Tables]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = Tables()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes: tuple[Size, ...] = metafunc.config.getoption("--sizes")
    chosen = {
        "size": sizes,
        "main": (MAIN if MAIN in sizes else sizes[0],),
        "fair": (FAIR,) if sizes == SIZES else (),
    }
    for name in chosen.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, chosen[name], ids=str)


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> Tables:
    return request.config.stash[TABLES]


@pytest.fixture(scope="session", autouse=True)
def require_compiled_ops() -> None:
    status = native.load()
    assert status.loaded, f"the compiled ops are not available: {status.reason}"


@pytest.fixture
def compare(tables: Tables, benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """Return a function that times a call in pairs with a baseline and writes the result into a cell of a table.

    pytest-benchmark times the call, and each round times the baseline just before. With `times` the ratio is that to so
    many calls of the baseline.
    """

    def pedantic(run: Callable[[], Any], setup: Callable[[], None], rounds: int) -> list[float]:
        benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark is disabled, by --benchmark-disable or by xdist")
        times: list[float] = benchmark.stats.stats.data
        return times

    def compare(
        title: str,
        row: str,
        column: object,
        run: Callable[[], Any],
        baseline: Callable[[], Any],
        times: int = 1,
    ) -> None:
        try:
            result = pairs.measure(run, baseline, request.config.getoption("--seconds"), pedantic)
        except pairs.TooSlow as reason:
            tables.add(title, row, str(column), f"– ({reason})")
            pytest.skip(str(reason))
        benchmark.extra_info["ratio to the baseline"] = result.ratio / times
        tables.add(title, row, str(column), result._replace(ratio=result.ratio / times))

    return compare


@pytest.hookimpl(trylast=True)  # after the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[TABLES].lines()
    if not lines:
        return
    capability = torch.ops.gistops.cpu_capability().replace("\n", "; ")
    terminalreporter.write_line(
        f"\n{hardware()}, kernels {capability}; n = rounds, each paired with the baseline"
    )
    for line in lines:
        terminalreporter.write_line(line)
