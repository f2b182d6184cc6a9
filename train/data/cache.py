"""The cache of image arrays: folders that are complete or absent, written by several processes.

Each folder has a lock, so that of several runs that start at once, one makes the folder and the others wait for it. Where
locks do not work, as on some network drives, each run makes the folder for itself, and the last one stays.

This module does not import torch, so that worker processes start quickly.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DataError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATIENCE = 2.0  # seconds of waiting for a lock before a message says so

_in_use: set[Path] = set()  # temporary folders of this process


def cache_folder(option: str) -> Path:
    """Return the folder of `--cache`, or the default one in the user's home if the option is empty.

    Raises:
        DataError: there is no home folder, as for a numeric user id that a container's /etc/passwd lacks.
    """
    if option:
        return Path(option)
    try:
        return Path.home() / ".cache" / "gistops" / "images"
    except RuntimeError:
        raise DataError("--cache: expected a folder, as there is no home folder, got none") from None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in the cache, against other processes and threads, while it is examined, made and opened.

    A killed process releases its locks. No lock is held if the cache is read-only or its file system has no locks.
    """
    file = folder.with_name(f".{folder.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file)
    except OSError:  # an error that matters is raised by `atomic_folder`, with its reason
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """Lock the file and return its descriptor. The holder removes the file, so a lock counts only if its file is there."""
    began = time.monotonic()
    is_patient = True
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    return descriptor
        except BlockingIOError:
            time.sleep(0.05)
            if is_patient and time.monotonic() - began > PATIENCE:
                is_patient = False
                print(f"waiting for another process, which holds {str(file)!r}", file=sys.stderr, flush=True)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` when the block succeeds and is removed otherwise.

    Args:
        folder: the final path; an existing folder is replaced. Readers that have opened its files keep them.
        needed: bytes that will be written.

    Raises:
        DataError: the folder cannot be written, or the disk has less free space.
    """
    _remove_leftovers(folder)
    temporary = _temporary_name(folder)
    _in_use.add(temporary)
    try:
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
        except OSError as error:
            raise DataError(f"--cache: expected a folder that can be written, got {error}") from None
        if free < needed:
            raise DataError(_too_full(folder, needed, f"{free:,}"))
        yield temporary
        _replace(temporary, folder)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DataError(_too_full(folder, needed, str(error))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _in_use.discard(temporary)


def _too_full(folder: Path, needed: int, got: str) -> str:
    return f"--cache: expected a folder with {needed:,} bytes free for images, got {got} in {folder.parent}"


def _temporary_name(folder: Path) -> Path:
    """Return a path beside the folder that no other process or thread uses."""
    return folder.with_name(f"{_prefix(folder)}{os.getpid()}.{secrets.token_hex(4)}")


def _prefix(folder: Path) -> str:
    return f".{folder.name}.{platform.node()}."


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of processes on this machine that were killed."""
    prefix = _prefix(folder)
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        # Early versions had no token after the process.
        found = re.fullmatch(r"(\d+)(\.[0-9a-f]{8})?", leftover.name.removeprefix(prefix))
        if found and leftover not in _in_use and not _is_another_process(int(found[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def _replace(temporary: Path, folder: Path) -> None:
    """Rename a folder; an existing one is moved aside first, so that none is ever seen with a part of its files."""
    while True:
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = _temporary_name(folder)
        with suppress(FileNotFoundError):  # another process moved it
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _is_another_process(process: int) -> bool:
    """Return whether another process on this machine has this id."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        pass
    return True


def reserve(file: Path, size: int) -> None:
    """Give a file this size and reserve its space: on a full disk, a write to a memory map ends the process."""
    with open(file, "ab") as opened:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)
