"""Folders of the cache are complete or absent, and worker processes start without torch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.data.cache import atomic_folder
from train.data.errors import DataError


def test_an_interrupted_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "set", 10) as temporary:
            (temporary / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="bytes free for images"), atomic_folder(tmp_path / "set", 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """The temporary folder of a process that is still running is kept."""
    script = (
        "import sys; from pathlib import Path; from train.data.cache import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), 1) as temporary:\n"
        "    (temporary / 'part').write_text('…'); print(flush=True); input()"
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "made")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        return process

    killed = start()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    working = start()
    (leftover,) = tmp_path.iterdir()  # of the second process, which removed that of the first
    with atomic_folder(tmp_path / "made", 1):
        assert leftover.is_dir()
    assert working.communicate("\n")[0] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["part"]


def test_modules_of_worker_processes_do_not_import_torch() -> None:
    script = (
        "import sys, train.data.cache, train.data.glyphs.dataset, train.data.sources.image_files\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
