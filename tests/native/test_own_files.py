"""The first-use cache: nothing is loaded that another user may have written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gistops import _build
from gistops.backends import _own_files, native

from .test_build import needs_compiler

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no such users and modes")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a cache that does not exist yet."""
    monkeypatch.setenv("GISTOPS_CACHE", str(tmp_path / "above" / "cache"))
    return tmp_path / "above" / "cache"


@pytest.fixture(params=[0o000, 0o002, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def planted() -> Path:
    """Write a library that is no library where the first-use build would be. Loading it would give an error."""
    library = native.first_use_path("some-hash")
    _own_files.make_folder(library.parent)
    for path in (library, _build.Record.path(library)):
        path.write_text("planted")
        path.chmod(0o644)
    return library


def refused(path: Path, why: str) -> None:
    status = native._use_first_use("some-hash")
    assert not status.loaded
    assert status.reason.startswith(f"{path} {why}")
    assert "Set GISTOPS_CACHE to a folder of your own" in status.reason
    assert "does not load" not in status.reason


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_folders_that_others_may_write(bits: int, cache: Path) -> None:
    library = planted()
    for folder in (cache, library.parent):
        folder.chmod(bits)
        refused(folder, f"has mode {bits:o}, which lets other users write")
        folder.chmod(0o700)
    assert "does not load" in native._use_first_use("some-hash").reason


@pytest.mark.parametrize("bits", [0o666, 0o664, 0o646])
def test_libraries_and_records_that_others_may_write(bits: int, cache: Path) -> None:
    library = planted()
    for path in (library, _build.Record.path(library)):
        path.chmod(bits)
        refused(path, f"has mode {bits:o}, which lets other users write")
        path.chmod(0o644)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user(cache: Path) -> None:
    library = planted()
    for path in (cache, library.parent, library):
        os.chown(path, 12345, -1)
        refused(path, "belongs to user 12345, expected root")
        os.chown(path, 0, -1)


@pytest.mark.usefixtures("umask")
def test_new_folders_are_for_their_owner_alone(cache: Path) -> None:
    _own_files.make_folder(cache / "library")
    assert [mode(path) for path in (cache.parent, cache, cache / "library")] == [0o700] * 3
    with _own_files.lock(cache / "lock"):
        assert mode(cache / "lock") == 0o600


def test_a_lock_that_is_a_symbolic_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    _own_files.make_folder(cache)
    (cache / "lock").symlink_to(tmp_path / "precious")
    (cache / "dangling").symlink_to(tmp_path / "absent")
    for name in ("lock", "dangling"):
        with pytest.raises(OSError, match=name), _own_files.lock(cache / name):
            pass
    assert (tmp_path / "precious").read_text() == "content"
    assert not (tmp_path / "absent").exists()


@needs_compiler
def test_a_build_is_accepted_whatever_the_umask(
    cache: Path, cheap_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "source_dir", lambda: cheap_sources)
    before = os.umask(0o000)
    try:
        library = native.build_on_first_use("some-hash")
    finally:
        os.umask(before)
    assert native.build_on_first_use("some-hash") == library
    assert (mode(library), mode(library.parent)) == (0o755, 0o700)
