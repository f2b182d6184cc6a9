"""Commands in the repository, within seconds that they are given, their output in a file from the first word on."""

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


@dataclass
class CommandResult:
    """A command that has ended, or has been ended."""

    code: int | None  # None where the time was up
    output: str
    seconds: float

    def tail(self, lines: int = 25) -> str:
        """The end of what it said."""
        return "\n".join(self.output.splitlines()[-lines:])


def python_command(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The same, ended by the kernel if this process is killed, where there is a tool for that."""
    tool = shutil.which("setpriv")
    return [tool, "--pdeathsig", "KILL", *arguments] if tool else list(arguments)


def run_command(
    arguments: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None
) -> CommandResult:
    """Run a command for at most `seconds`: somewhat before, it is asked to stop, and at the end made to.

    Args:
        arguments: the command.
        seconds: that it may take.
        log: the file that it writes into.
        environment: variables to set beside those that are set.
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
            start_new_session=True,  # so that what it starts ends with it
        )
        with _lock:
            _running.add(process.pid)
        late = False
        try:
            process.wait(max(seconds - grace, 0.5))
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)  # pytest then still says how many tests have passed
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
    """End a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_all() -> None:
    """End every command that still runs: this process is about to end."""
    with _lock:
        for group in _running:
            kill_group(group)
