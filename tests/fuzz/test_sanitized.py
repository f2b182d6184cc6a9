"""The random cases on a build of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gistops import _build
from gistops._toolchain import Tools
from gistops.backends import native
from tests.host_cuda.build import SANITIZED, SANITIZERS, compiler, sanitized_pytest


@pytest.mark.compile
@pytest.mark.skipif(SANITIZED in os.environ, reason="this is the process that the test starts")
def test_under_address_and_undefined_behavior_sanitizers(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    library = tmp_path / "gistops" / native.LIBRARY
    sanitizing = (compiler(), *SANITIZERS, "-g1")
    tools = replace(Tools.find(), compiler=sanitizing, cuda="left out: these are the CPU kernels")
    _build.build(native.source_dir(), library, tmp_path / "objects", tools)
    given = {name: request.config.getoption(name) for name in ("seed", "cases")}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = sanitized_pytest(
        library, [str(Path(__file__).parent), *options, "-k", "cpu or library"], PYTHONPATH=search
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"


@pytest.mark.skipif(SANITIZED not in os.environ, reason="run by the test above, in a new process")
def test_the_library_is_the_sanitized_one() -> None:
    assert str(native.load().path) == os.environ[SANITIZED]
