"""Compile kernels for the host into a Python module, plain or sanitized, cached by a hash of all sources and flags."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
SHIM = HERE / "shim"
SANITIZED = "GISTOPS_TEST_SANITIZED"  # path of the sanitized library, set in the process that tests it

FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-clobbered",
    "-DGISTOPS_SM90A=1",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    """Return the path of g++. clang's sanitizers would need other preloaded libraries."""
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("g++: expected on PATH to compile the kernels for the host, found none")
    return found


def _includes(folders: Sequence[Path]) -> list[str]:
    import pybind11

    paths = [SHIM, *folders, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    return [word for path in paths for word in (("-isystem" if path in paths[-2:] else "-I"), str(path))]


def build(name: str, sources: Sequence[Path], folders: Sequence[Path], sanitize: bool, cache: Path) -> Path:
    """Compile `sources` and the shim into the Python module `name`.

    Args:
        name: Name of the module. The sources define it with PYBIND11_MODULE(GISTOPS_MODULE, m).
        sources: .cu and .cpp files.
        folders: Folders of their headers, searched after the shim's.
        sanitize: Compile with AddressSanitizer and UndefinedBehaviorSanitizer.
        cache: Folder in which compiled modules are kept.

    Returns:
        The path of the module.

    Raises:
        RuntimeError: If there is no g++, or with its error messages if it fails.
    """
    sources = [*sources, SHIM / "fibers.cpp"]
    flags = [*FLAGS, *(SANITIZERS if sanitize else ()), f"-DGISTOPS_MODULE={name}", *_includes(folders)]
    digest = hashlib.sha256(shlex.join([compiler(), *flags]).encode())
    read = {path for folder in (SHIM, *folders) for path in folder.glob("*.*")} | set(sources)
    for path in sorted(read):
        digest.update(path.name.encode() + path.read_bytes())
    out = cache / f"{name}-{digest.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: Path) -> Path:
            obj = Path(temporary, source.name + ".o")
            run([compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(obj)])
            return obj

        objects = list(pool.map(compiled, sources))
        linked = Path(temporary, out.name)
        run([compiler(), *flags, "-shared", *map(str, objects), "-o", str(linked)])
        os.replace(linked, out)
    return out


def run(command: list[str]) -> None:
    """Run a compiler, and raise RuntimeError with its error messages if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")


def load(name: str, path: Path) -> ModuleType:
    """Import a module that `build` compiled."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_pytest(
    library: Path, arguments: Sequence[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest on a sanitized library in a new process, with the sanitizers' libraries preloaded, as they require."""
    libraries = [
        subprocess.run(
            [compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for library in ("libasan.so", "libubsan.so")
    ]
    sanitizers = {
        SANITIZED: str(library),
        "LD_PRELOAD": " ".join(libraries),
        # Leaks and duplicate symbols in PyTorch are not faults of the kernels.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # -s: AddressSanitizer writes to the real stderr
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, env=os.environ | sanitizers | environment, capture_output=True, text=True, check=False
    )
