from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest

Runner = Callable[..., None]


@pytest.fixture
def run_cases(request: pytest.FixtureRequest) -> Runner:
    """Run a check on random cases: `run_cases(check, name=strategy, ...)`."""

    def run(check: Callable[..., None], **strategies: Any) -> None:
        key = f"{request.config.getoption('--seed')} {request.node.nodeid}"
        settings = hypothesis.settings(
            max_examples=request.config.getoption("--cases"),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(zlib.crc32(key.encode()))(settings(hypothesis.given(**strategies)(check)))()

    return run
