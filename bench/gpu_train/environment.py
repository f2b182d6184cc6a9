"""Resources that the training processes share: NVIDIA's MPS and the caches of torch.compile and Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The same path on every machine, because some of the cached files contain it.
CACHE = Path(tempfile.gettempdir()) / "gistops-compiled"


def compile_cache_env(archive: Path | None) -> dict[str, str]:
    """Return the variables that select the caches, after unpacking `archive` into them if it exists."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE), "TRITON_CACHE_DIR": str(CACHE / "triton")}
    CACHE.mkdir(parents=True, exist_ok=True)
    if archive and archive.exists():
        with tarfile.open(archive) as file:
            if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4 and newer
                file.extractall(CACHE, filter="data")
            else:
                file.extractall(CACHE)
    return env


def has_compiled_code() -> bool:
    """Return True if the cache holds a compiled graph."""
    return CACHE.exists() and any(CACHE.rglob("fxgraph/*"))


def save_compile_cache(archive: Path | None) -> None:
    """Pack the cache into `archive`, for another machine of the same kind."""
    if archive is None or not has_compiled_code():
        return
    temporary = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(temporary, "w:gz", compresslevel=6) as file:
        for path in sorted(CACHE.rglob("*")):
            if path.is_file() and path.suffix not in (".lock", ".tmp"):
                file.add(path, path.relative_to(CACHE))
    temporary.replace(archive)


@contextmanager
def multi_process_service(wanted: bool) -> Iterator[dict[str, str]]:
    """Run NVIDIA's MPS in the `with`, if it is wanted and available, and yield the variables that its clients need.

    With MPS the kernels of several processes run at the same time instead of in time slices. The server belongs to
    this user, keeps its files in a temporary folder and changes no setting of the GPU.
    """
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        control = "nvidia-cuda-mps-control"
        try:
            subprocess.run([control, "-d"], env={**os.environ, **env}, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            print(
                f"warning: MPS is not available; the processes take turns on the GPU ({error})",
                file=sys.stderr,
            )
            yield {}
            return
        try:
            yield env
        finally:
            try:
                subprocess.run([control], input=b"quit\n", env={**os.environ, **env}, timeout=10, check=False)
            except subprocess.SubprocessError as error:
                print(f"warning: MPS did not end ({error})", file=sys.stderr)
