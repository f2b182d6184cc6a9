"""Files that only their owner may change: the first-use cache holds libraries that are loaded into the process.

A library at a predictable path could be put there by another user. Nothing is loaded from a folder or a file that belongs
to another user than the current one or root, or that a group or all users may write.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


class UnsafeError(Exception):
    """Another user may have written a file that is about to be loaded."""


def make_folder(path: Path) -> None:
    """Create a folder, and the folders above it, for the current user alone. Check it if it exists.

    Raises:
        UnsafeError: other users may write it.
        OSError: it cannot be created.
    """
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    check(path)


def check(*paths: Path) -> None:
    """Check that existing folders or files belong to the current user or root, and that no other user may write them.

    Raises:
        UnsafeError: one does not; the message says what to do.
    """
    if not hasattr(os, "getuid"):  # Windows has no such modes
        return
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:  # a library may have no record
            continue
        user = os.getuid()
        problem = None
        if status.st_uid not in (user, 0):
            expected = f"user {user} or root" if user else "root"
            problem = f"belongs to user {status.st_uid}, expected {expected}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            problem = f"has mode {mode:o}, which lets other users write"
        if problem:
            raise UnsafeError(
                f"{path} {problem}; a library there may come from another user and is not loaded."
                " Set GISTOPS_CACHE to a folder of your own, or delete this one"
            )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold a lock file; yield False if locks do not work. The lock of a killed process is released.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(os.open(path, flags, 0o600), "r+b") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True
