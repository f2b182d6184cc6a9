"""Loading: unsuitable libraries, the build on first use, and concurrent processes.

Each case runs in its own process, because a process loads the ops once. The cases load cheap sources.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gistops import _build, info
from gistops.backends import native

from .test_build import needs_compiler

pytestmark = needs_compiler

LOAD = """
import dataclasses, json, pathlib, sys
from gistops.backends import native
native.source_dir = lambda: pathlib.Path(sys.argv[1])
print(json.dumps(dataclasses.asdict(native.load()), default=str))
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on the path for the library of an installed gistops."""
    (tmp_path / "site" / "gistops").mkdir(parents=True)
    return tmp_path / "site"


@pytest.fixture
def start(cheap_sources: Path, site: Path, tmp_path: Path) -> Start:
    """Start processes that load the ops and print the status."""

    def start(**environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join(map(str, (site, native.PACKAGE.parent)))
        env = {**os.environ, "GISTOPS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path, **environment}
        command = [sys.executable, "-c", LOAD, str(cheap_sources)]
        return subprocess.Popen(
            command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


def result(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out), err


def slow_compiler(folder: Path, seconds: float) -> str:
    compiler = " ".join(_build.Tools.find().compiler)
    script = folder / "slow-c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep {seconds}\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    return str(script)


def record(cheap_sources: Path, torch_version: str) -> _build.Record:
    return _build.Record(_build.source_hash(cheap_sources), torch_version, "some compiler", "none")


def test_two_processes_at_once_compile_once(start: Start, tmp_path: Path) -> None:
    compiler = slow_compiler(tmp_path, 0.2)
    results = [result(process) for process in [start(CXX=compiler), start(CXX=compiler)]]
    assert all(status["loaded"] and status["origin"] == "first use" for status, _ in results)
    assert sorted(err.count("gistops: compiling") for _, err in results) == [0, 1]
    folder = Path(results[0][0]["path"]).parent
    assert sorted(path.name for path in folder.iterdir()) == ["_C.json", "_C.so", "lock"]


def test_killed_build_does_not_block_others(start: Start, tmp_path: Path) -> None:
    killed = start(CXX=slow_compiler(tmp_path, 1))
    while not list((tmp_path / "cache").glob("*/build-*/build.ninja")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    status, _ = result(start())
    assert status["loaded"], status


def test_file_system_without_locks(
    cheap_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(native, "source_dir", lambda: cheap_sources)
    monkeypatch.setenv("GISTOPS_CACHE", str(tmp_path / "cache"))
    assert native.build_on_first_use("some-hash").is_file()
    assert native.build_on_first_use("some-hash").is_file()
    assert capfd.readouterr().err.count("gistops: compiling") == 1


def test_library_that_does_not_load(start: Start, site: Path, cheap_sources: Path) -> None:
    library = site / "gistops" / native.LIBRARY
    library.write_text("no library at all")
    record(cheap_sources, "2.11.0").write(library)
    status, _ = result(start())
    assert status["loaded"]
    assert status["origin"] == "first use"
    assert status["built_for"] == torch.__version__
    assert f"{library} does not load" in status["error"]
    assert f"built for torch 2.11.0, you have {torch.__version__}" in status["error"]


def test_library_that_does_not_load_without_a_build(
    site: Path, cheap_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = site / "gistops" / native.LIBRARY
    library.write_text("no library at all")
    record(cheap_sources, "2.11.0").write(library)
    monkeypatch.setattr(native, "source_dir", lambda: cheap_sources)
    monkeypatch.setattr(native, "_installed", lambda: [library])
    monkeypatch.setenv("GISTOPS_JIT", "0")
    status = native._find_and_load()
    assert not status.loaded
    for words in (f"you have {torch.__version__}", native.REINSTALL, "GISTOPS_JIT=0 forbids"):
        assert words in status.reason


def test_library_without_a_record_is_not_opened(site: Path) -> None:
    library = site / "gistops" / native.LIBRARY
    shutil.copy(torch._C.__file__, library)  # this one would load
    status = native._use_installed(library, "any hash")
    assert not status.loaded
    assert "is not this package's: it has no readable _C.json beside it" in status.reason
    assert native.REINSTALL in status.reason


def test_library_with_a_wrong_record(start: Start, site: Path, cheap_sources: Path) -> None:
    library = site / "gistops" / native.LIBRARY
    shutil.copy(torch._C.__file__, library)
    record(cheap_sources, torch.__version__).write(library)
    status, _ = result(start())
    assert status["origin"] == "first use"
    assert "does not define gistops::logits_forward" in status["error"]


def test_library_is_used_only_with_the_sources_it_was_built_from(
    start: Start, site: Path, cheap_sources: Path
) -> None:
    library = site / "gistops" / native.LIBRARY
    _build.build(cheap_sources, library, site / "objects")
    status, _ = result(start(GISTOPS_JIT="0"))
    assert (status["origin"], status["path"]) == ("install", str(library))
    (cheap_sources / "new.h").write_text("// a change\n")
    other = native._use_installed(library, _build.source_hash(cheap_sources))
    assert not other.loaded
    assert "compiled from other sources" in other.reason


def test_failures_are_reported_not_raised(
    tmp_path: Path, cheap_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(native, "source_dir", lambda: cheap_sources)
    monkeypatch.setenv("GISTOPS_CACHE", str(tmp_path / "file" / "below"))
    status = native._find_and_load()
    assert not status.loaded
    assert "set GISTOPS_CACHE to a writable folder" in status.reason

    monkeypatch.setenv("GISTOPS_CACHE", str(tmp_path / "cache"))
    (cheap_sources / "cpu" / "dispatch.cpp").write_text("#error deliberately broken\n")
    status = native._find_and_load()
    assert not status.loaded
    assert "error: #error deliberately broken" in status.reason
    assert not list((tmp_path / "cache").glob("*/build-*"))
    assert not asdict(status)["path"]


def test_without_a_home_folder_the_reason_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may run a numeric user id that their /etc/passwd lacks. An unknown user has no home folder either."""
    monkeypatch.setenv("GISTOPS_CACHE", "~no-such-user/cache")
    reason = "no home folder for ~no-such-user/cache; set GISTOPS_CACHE to a writable folder"
    assert native._use_first_use("some-hash").reason == f"cannot compile on first use: {reason}"
    assert info.info()["cache"]["folder"] == reason
