from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest

Runner = Callable[..., None]


@pytest.fixture
def run_cases(request: pytest.FixtureRequest) -> Runner:
    """Run a check on examples and on random cases: `run_cases(check, examples, name=strategy, ...)`.

    Without --cases, the cases are few and do not depend on --seed, so that a change seldom fails for a case of another
    change. Hypothesis also draws numbers that occur in the modules imported so far.
    """
    cases = request.config.getoption("--cases")
    seed = 0 if cases is None else request.config.getoption("--seed")

    def run(check: Callable[..., None], examples: Sequence[tuple[Any, ...]] = (), **strategies: Any) -> None:
        key = f"{seed} {request.node.nodeid}"
        settings = hypothesis.settings(
            max_examples=40 if cases is None else cases,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        test = settings(hypothesis.given(**strategies)(check))
        for example in examples:
            test = hypothesis.example(**dict(zip(strategies, example, strict=True)))(test)
        hypothesis.seed(zlib.crc32(key.encode()))(test)()

    return run
