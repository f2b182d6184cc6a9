"""The things that the processes of `bench.gpu_train` share: the GPU, by NVIDIA's MPS, and what torch.compile made."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The same on every machine, as some of what lies there names its place.
COMPILED = Path(tempfile.gettempdir()) / "gistops-compiled"


def compiled_env(archive: Path | None) -> dict[str, str]:
    """The folders where torch.compile and Triton keep what they make, filled from the archive if there is one."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED), "TRITON_CACHE_DIR": str(COMPILED / "triton")}
    COMPILED.mkdir(parents=True, exist_ok=True)
    if archive and archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(COMPILED, filter="data")
    return own


def warm() -> bool:
    """True if anything was compiled before."""
    return COMPILED.exists() and any(COMPILED.rglob("fxgraph/*"))


def pack(archive: Path | None) -> None:
    """Keep what was compiled for another machine of the same kind."""
    if archive is None or not warm():
        return
    aside = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(aside, "w:gz", compresslevel=6) as file:
        for path in sorted(COMPILED.rglob("*")):
            if path.is_file() and path.suffix not in (".lock", ".tmp"):
                file.add(path, path.relative_to(COMPILED))
    aside.replace(archive)


@contextmanager
def together_on_gpu(wanted: bool) -> Iterator[dict[str, str]]:
    """With NVIDIA's MPS, if it is wanted and there: kernels of several processes then run at one time, not in turns.

    It is a server of this user's, with folders of its own; it ends here, and leaves the GPU's settings as they are.
    """
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory() as place:
        env = {"CUDA_MPS_PIPE_DIRECTORY": place, "CUDA_MPS_LOG_DIRECTORY": place}
        control = "nvidia-cuda-mps-control"
        try:
            subprocess.run([control, "-d"], env={**os.environ, **env}, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"warning: no MPS, so processes take turns on the GPU ({error})", file=sys.stderr)
            yield {}
            return
        try:
            yield env
        finally:
            try:
                subprocess.run([control], input=b"quit\n", env={**os.environ, **env}, timeout=10, check=False)
            except subprocess.SubprocessError as error:
                print(f"warning: MPS did not end ({error})", file=sys.stderr)
