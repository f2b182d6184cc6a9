from __future__ import annotations

import pytest

from gistops import backends

from ..conftest import FUSED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    one = metafunc.config.getoption("--backend")
    fused = [one] if one else FUSED[metafunc.config.getoption("--device")]
    # Where each GPU backend has a run of its own, the reference is tested in one of them.
    plain = [] if one == "triton" else ["reference"]
    for name, values in (("fused", fused), ("backend", [*fused, *plain])):
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
