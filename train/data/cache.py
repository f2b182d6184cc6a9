"""What is made once, by several processes, and kept whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder(asked: str) -> Path:
    """Where arrays made of images are kept: `--cache`, or a folder in the user's home."""
    return Path(asked) if asked else Path.home() / ".cache" / "gistops" / "images"


def shared(array: np.ndarray) -> Tensor:
    """The array as a tensor. One that is mapped to be read alone stays so: writing to it ends the process.

    A mapping that could be written to would count as memory, of which there may be less.
    """
    import torch  # not for the processes that draw and decode

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


@contextmanager
def whole_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder to write to, which takes the name `folder` when the block ends well and is removed otherwise.

    Args:
        folder: the name; what is there is replaced.
        needed: bytes that will be written.

    Raises:
        DataError: the disk has less free.
    """
    mine = f".{folder.name}.{platform.node()}."
    for left in folder.parent.glob(f"{glob.escape(mine)}*"):  # by one that was killed
        if not _alive(int(left.name.removeprefix(mine))):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{mine}{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(aside).free) < needed:
            raise DataError(f"{folder.parent}: expected {needed:,} bytes free for images, got {free:,}")
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether there is another process of that number on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def mapping(few: bool, workers: int | None) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, over several processes unless there is too little to do; as many as processors if `workers` is None."""
    if few:
        yield map
    else:
        # Not fork: a process with threads, as torch's are, may hang in it.
        with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
            yield pool.map
