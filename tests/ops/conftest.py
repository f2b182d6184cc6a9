from __future__ import annotations

import pytest

from gistops import backends

#: What is tested on each device: a test run without it would prove little, so it must be there.
FUSED = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fused = FUSED[metafunc.config.getoption("--device")]
    for name, values in (("fused", fused), ("backend", [*fused, "reference"])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, indirect=True)


def _available(name: str) -> str:
    reason = backends.why_not(name)
    assert reason is None, f"backend {name!r} is not available: {reason}"
    return name


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves the device under test."""
    return _available(str(request.param))


@pytest.fixture
def fused(request: pytest.FixtureRequest) -> str:
    """Each backend but the reference."""
    return _available(str(request.param))
