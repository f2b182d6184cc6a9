"""Commands that run in the repository with a time limit and write their output to a file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_running: set[int] = set()
_lock = threading.Lock()
_exiting = threading.Event()


@dataclass
class CommandResult:
    """The result of a command that has ended or was killed."""

    code: int | None  # None if the time was up
    output: str
    seconds: float

    def tail(self, lines: int = 25) -> str:
        """Return the last lines of the output."""
        return "\n".join(self.output.splitlines()[-lines:])


def python_command(*arguments: str) -> list[str]:
    """Return a command for this Python interpreter."""
    return [sys.executable, *arguments]


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """Wrap a command so that the kernel kills it if this process dies (needs setpriv; otherwise unchanged)."""
    tool = shutil.which("setpriv")
    return [tool, "--pdeathsig", "KILL", *arguments] if tool else list(arguments)


def run_command(
    arguments: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None
) -> CommandResult:
    """Run a command for at most `seconds`. It gets SIGINT shortly before the limit and SIGKILL at the limit.

    Args:
        arguments: the command.
        seconds: time limit.
        log: file of the output.
        environment: variables added to the current environment.
    """
    begin = time.monotonic()
    grace = min(8.0, seconds / 5)
    with log.open("wb") as out:
        process = subprocess.Popen(
            die_with_parent(arguments),
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children end with it
        )
        with _lock:
            _running.add(process.pid)
            if _exiting.is_set():
                kill_group(process.pid)
        late = False
        try:
            process.wait(max(seconds - grace, 0.5))
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)  # pytest still prints its counts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            kill_group(process.pid)
            process.wait()
            with _lock:
                _running.discard(process.pid)
    output = log.read_text(encoding="utf-8", errors="replace")
    return CommandResult(None if late else process.returncode, output, time.monotonic() - begin)


def kill_group(group: int) -> None:
    """Kill a command and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_all(exiting: bool = False) -> None:
    """Kill all running commands; if this process is exiting, also those that other threads start from now on."""
    if exiting:
        _exiting.set()
    with _lock:
        for group in _running:
            kill_group(group)
