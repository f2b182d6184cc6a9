"""The compiled ops: find or build the library, load it once per process, and complete its ops."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import _build
from .._toolchain import BuildError, Tools, host_machine
from ..operators import registry
from ..operators.cross_entropy import CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_FORWARD
from ..operators.logits import CENTER_NORMS, FROZEN_LOGITS, LOGITS_BACKWARD, LOGITS_FORWARD
from ..operators.rotation_planes import ROTATION_PLANES, ROTATION_PLANES_BACKWARD
from ..operators.topk import FUSED_TOPK, Best
from . import _own_files
from ._own_files import UnsafeError
from .chunked import ChunkedOps

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = "_C.so"
REINSTALL = "`pip install --force-reinstall --no-deps` of gistops builds it again"


@dataclass(frozen=True)
class Status:
    """The state of the compiled ops in this process."""

    loaded: bool
    reason: str  # where the library comes from, or why it is missing and how to get it
    path: Path | None = None
    origin: str | None = None  # when the library was compiled: "install" or "first use"
    built_for: str | None = None  # version of torch
    compiler: str | None = None
    cuda: str = ""  # GPU architectures in the library, such as "sm_80 sm_90a", or why there are none
    error: str | None = None  # the last library that did not load, and why


def source_dir() -> Path:
    """Return the folder of the C++ sources: in an installed package, or beside the package in a source tree."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def cache_dir() -> Path:
    """Return the folder of first-use builds: $GISTOPS_CACHE, or gistops/ in the user's cache folder.

    Raises:
        BuildError: there is no home folder, as for a numeric user id that a container's /etc/passwd lacks.
    """
    own = os.environ.get("GISTOPS_CACHE")
    folder = own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/gistops"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise BuildError(f"no home folder for {folder}; set GISTOPS_CACHE to a writable folder") from None


def first_use_path(wanted: str) -> Path:
    """Return the path of the first-use build of the sources with hash `wanted`, for this torch and machine."""
    return cache_dir() / f"{wanted}-torch{torch.__version__}-{host_machine()}" / LIBRARY


def _installed() -> list[Path]:
    """Return the libraries compiled at install: this package's own, then those of other gistops folders on sys.path.

    The latter matter when tests run from the repository: `gistops` is then the source folder, and the library is in
    site-packages. A library is used only if it was built from the same sources.
    """
    folders = [PACKAGE, *(Path(entry).resolve() / "gistops" for entry in sys.path)]
    return [path for path in dict.fromkeys(folder / LIBRARY for folder in folders) if path.is_file()]


def _load_error(path: Path) -> str | None:
    """Load a library; return an error message, or None."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error.__cause__ or error}"  # torch's own message names only the path
    if not hasattr(torch.ops.gistops, "logits_forward"):
        return f"{path} loads, but does not define gistops::logits_forward"
    return None


def _loaded(how: str, origin: str, path: Path, record: _build.Record | None) -> Status:
    if record is None:
        return Status(True, f"{how}: {path}", path, origin, cuda="its record cannot be read")
    return Status(True, f"{how}: {path}", path, origin, record.torch, record.compiler, record.cuda)


def _use_installed(path: Path, wanted: str) -> Status:
    record = _build.Record.read(path)
    if record is None:
        why = f"{path} is not this package's: it has no readable {_build.Record.path(path).name} beside it"
        return Status(False, f"{why}; {REINSTALL}", path, error=why)
    if record.source_hash != wanted:
        return Status(False, f"{path} was compiled from other sources than {source_dir()}", path)
    if error := _load_error(path):
        if record.torch != torch.__version__:
            error += f"; it was built for torch {record.torch}, you have {torch.__version__}"
        return Status(False, f"{error}; {REINSTALL}", path, error=error)
    return _loaded("compiled at install", "install", path, record)


def build_on_first_use(wanted: str) -> Path:
    """Return the library in the cache folder; compile it if needed. Safe with several processes at once.

    Raises:
        BuildError: the library cannot be compiled here.
        OSError: the cache folder cannot be written.
        UnsafeError: other users may write the cache folder or the library.
    """
    out = first_use_path(wanted)
    _own_files.make_folder(cache_dir())
    if out.is_file():
        _own_files.check(out.parent, out, _build.Record.path(out))
        return out
    tools = Tools.find()
    _own_files.make_folder(out.parent)
    # One process compiles and the others wait. If locks do not work, every process compiles for itself. This is slower
    # but just as safe, because a build in a temporary folder is moved into place in one step.
    with _own_files.lock(out.parent / "lock") as alone:
        if out.is_file():
            _own_files.check(out, _build.Record.path(out))
            return out
        if alone:
            for left in out.parent.glob("build-*"):  # left by a killed process
                shutil.rmtree(left, ignore_errors=True)
        say = f"gistops: compiling the ops for torch {torch.__version__}, once (seconds; with CUDA a minute or two)"
        print(f"{say}; they are kept in {out.parent}", file=sys.stderr, flush=True)
        tmp = Path(tempfile.mkdtemp(prefix="build-", dir=out.parent))
        try:
            _build.build(source_dir(), tmp / LIBRARY, tmp, tools)
            for path, mode in ((tmp / LIBRARY, 0o755), (_build.Record.path(tmp / LIBRARY), 0o644)):
                path.chmod(mode)  # whatever the umask: the checks above refuse what a group may write
            # The record first, so that a library always has one.
            os.replace(_build.Record.path(tmp / LIBRARY), _build.Record.path(out))
            os.replace(tmp / LIBRARY, out)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return out


def _use_first_use(wanted: str) -> Status:
    if os.environ.get("GISTOPS_JIT") == "0":
        return Status(False, "GISTOPS_JIT=0 forbids compiling on first use; unset it to allow it")
    try:
        path = build_on_first_use(wanted)
    except BuildError as failure:
        return Status(False, f"cannot compile on first use: {failure}")
    except UnsafeError as failure:
        return Status(False, str(failure), error=str(failure))
    except OSError as failure:
        why = f"cannot compile on first use into {cache_dir()}: {failure}"
        return Status(False, f"{why}; set GISTOPS_CACHE to a writable folder")
    if error := _load_error(path):
        return Status(False, f"{error}; delete {path.parent} to compile it again", path, error=error)
    return _loaded("compiled on first use", "first use", path, _build.Record.read(path))


def _find_and_load() -> Status:
    wanted = _build.source_hash(source_dir())
    refused = []
    for path in _installed():
        status = _use_installed(path, wanted)
        if status.loaded:
            break
        refused.append(status)
    else:
        status = _use_first_use(wanted)
    errors = [s.error for s in (*refused, status) if s.error]
    reasons = [s.reason for s in (*refused, status)]
    return replace(
        status,
        reason=status.reason if status.loaded else "; ".join(reasons),
        error=errors[-1] if errors else None,
    )


def _complete(cuda: bool) -> None:
    """Complete the compiled ops: fake kernels, autograd, autocast, and on CUDA the ops that have no compiled kernel."""
    ops = torch.ops.gistops
    chunked_kernels = ChunkedOps(ops, lambda a: Best(*ops.fused_topk.default(*a))).kernels()
    for op in (
        LOGITS_FORWARD,
        LOGITS_BACKWARD,
        CROSS_ENTROPY_FORWARD,
        CROSS_ENTROPY_BACKWARD,
        *chunked_kernels,
        CENTER_NORMS,
        FROZEN_LOGITS,
        FUSED_TOPK,
        ROTATION_PLANES,
        ROTATION_PLANES_BACKWARD,
    ):
        registry.complete(ops, op)
    if cuda:
        for op, kernel in chunked_kernels.items():
            registry.implement(ops, op, kernel, "CUDA")


_status: Status | None = None
_once = threading.Lock()


def load() -> Status:
    """Load the compiled ops, once; never raises."""
    global _status
    with _once:
        if _status is None:
            try:
                _status = _find_and_load()
                if _status.loaded:
                    _complete(cuda=_status.cuda.startswith("sm_"))
            except Exception as error:  # the reference backend must stay usable
                why = f"{type(error).__name__}: {error}"
                _status = Status(False, why, error=why)
        return _status


def why_not_cpu(device_type: str) -> str | None:
    """Return why the compiled ops cannot serve on the CPU and how to get them, or None if they can."""
    status = load()
    return None if status.loaded else status.reason


def why_not_cuda(device_type: str) -> str | None:
    """Return why the compiled ops cannot serve on an NVIDIA GPU and how to get them, or None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; pytorch.org says how to install one with it"
    status = load()
    if not status.loaded:
        return status.reason
    if not status.cuda.startswith("sm_"):
        return f"{status.path} holds no CUDA kernels: {status.cuda}"
    if device_type == "meta":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"its kernels need compute capability 8.0 or newer, got {major}.{minor} ({name})"
    return None
