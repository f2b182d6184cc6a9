"""The cache of image arrays: folders that are complete or absent, written by several processes.

This module does not import torch, so that worker processes start quickly.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .errors import DataError


def cache_folder(option: str) -> Path:
    """Return the folder of `--cache`, or the default one in the user's home if the option is empty."""
    return Path(option) if option else Path.home() / ".cache" / "gistops" / "images"


@contextmanager
def atomic_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` when the block succeeds and is removed otherwise.

    Args:
        folder: the final path; an existing folder is replaced.
        needed: bytes that will be written.

    Raises:
        DataError: the disk has less free space.
    """
    prefix = f".{folder.name}.{platform.node()}."
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):  # from a process that was killed
        if not _is_running(int(leftover.name.removeprefix(prefix))):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(temporary).free) < needed:
            raise DataError(
                f"{folder.parent}: expected {needed:,} bytes free for images, got {free:,}; "
                f"--cache names another folder"
            )
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_running(process: int) -> bool:
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


@contextmanager
def process_map(workers: int | None, *, serial: bool) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` over `workers` processes, by default one per processor; the built-in `map` if `serial`."""
    if serial:
        yield map
    else:
        # Not fork: a fork of a process with threads, such as torch's, may deadlock.
        with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
            yield pool.map
