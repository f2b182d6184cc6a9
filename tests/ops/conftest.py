from __future__ import annotations

import pytest

from gistops.backends import native


@pytest.fixture
def cpu() -> str:
    """The compiled backend, which must be there: a test run without it would prove little."""
    status = native.load()
    assert status.loaded, f"the compiled backend is not available: {status.reason}"
    return "cpu"


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that serves this machine."""
    return str(request.getfixturevalue("cpu")) if request.param == "cpu" else "reference"
