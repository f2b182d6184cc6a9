from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest

Runner = Callable[..., None]


@pytest.fixture
def run_cases(request: pytest.FixtureRequest) -> Runner:
    """Run a check on random cases: `run_cases(check, name=strategy, ...)`.

    Without --cases, the cases are few and always the same, so that a change does not fail for a case of another change.
    """
    cases = request.config.getoption("--cases")
    seed = 0 if cases is None else request.config.getoption("--seed")

    def run(check: Callable[..., None], **strategies: Any) -> None:
        key = f"{seed} {request.node.nodeid}"
        settings = hypothesis.settings(
            max_examples=40 if cases is None else cases,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(zlib.crc32(key.encode()))(settings(hypothesis.given(**strategies)(check)))()

    return run
