"""The lock of a folder, so that two processes do not write the same run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .. import distributed
from ..config import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock while the context is active. Rank 0 holds it for all processes of a run.

    The operating system releases the lock when the process ends, however it ends. The file stays.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written to.
    """
    if distributed.rank():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not inherited by programs that this process starts, which might outlive it.
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except FileExistsError:
        raise ConfigError("name", "a folder", f"{folder}, which is a file") from None
    except OSError as error:
        raise ConfigError("runs", "a writable folder", f"{folder} ({error.strerror})") from None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, file)
        _acquire(file, folder)
        stack.callback(_clear, file)
        yield


def _clear(file: int) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)


def _acquire(file: int, folder: Path) -> None:
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        expected = "a run that no other process is writing"
        raise ConfigError("name", expected, f"{folder}, held by {_holder(file)}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        message = f"{folder}: this file system has no locks, so nothing keeps a second process from this run"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"process": os.getpid(), "host": platform.node(), "since": now}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)


def _holder(file: int) -> str:
    """Return a description of the process that holds the lock."""
    try:
        holder = json.loads(os.pread(file, 1000, 0))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
