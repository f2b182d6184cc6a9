"""Finds what a build needs: torch's headers and libraries, a C++ compiler, ninja. Imports none of them.

pip builds packages in an environment without torch, so that torch is looked for by path.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)


class BuildError(RuntimeError):
    """The native code cannot be built here; the message says what is missing, or what the compiler said."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, as a compiler sees it."""

    root: Path
    version: str

    @property
    def include(self) -> Path:
        """The folder of its headers."""
        return self.root / "include"

    @property
    def lib(self) -> Path:
        """The folder of its libraries."""
        return self.root / "lib"


@dataclass(frozen=True)
class Tools:
    """All that a build needs besides the sources."""

    torch: Torch
    compiler: tuple[str, ...]
    ninja: Path

    @classmethod
    def find(cls) -> Tools:
        """Find them here.

        Raises:
            BuildError: one is missing; the message says which, and how to get it.
        """
        return cls(find_torch(), find_compiler(), find_ninja())

    def compiler_version(self) -> str:
        """The first line of what the compiler says of itself."""
        answer = subprocess.run([*self.compiler, "--version"], capture_output=True, text=True, check=False)
        return (answer.stdout.splitlines() or [shlex.join(self.compiler)])[0].strip()


def _torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")  # finds it, does not import it
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # Under pip's build isolation torch is hidden by PYTHONPATH, yet the interpreter is the one that is
    # installed into: without PYTHON* variables (-E) it finds the torch that the package will run with.
    ask = "import sys, importlib.util as u; del sys.path[0]; s = u.find_spec('torch'); print(s and s.origin)"
    answer = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True, check=False)
    origin = answer.stdout.strip()
    if origin.endswith(".py"):
        yield Path(origin).parent


def find_torch() -> Torch:
    """The torch that the package will run with.

    Raises:
        BuildError: there is none, it is too old, or its headers or libraries are missing.
    """
    for root in _torch_folders():
        version_file = root / "version.py"
        if not version_file.is_file():
            continue
        found = re.search(
            r"^__version__\s*=\s*['\"]([^'\"]+)", version_file.read_text(encoding="utf-8"), re.M
        )
        torch = Torch(root, found.group(1) if found else "0.0 (its version.py names none)")
        if tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2]) < MIN_TORCH:
            wanted = ".".join(map(str, MIN_TORCH))
            raise BuildError(
                f"torch: expected {wanted} or newer, got {torch.version} in {root}; "
                "`pip install --upgrade torch` brings a newer one"
            )
        header = torch.include / "torch" / "csrc" / "stable" / "library.h"
        if not header.is_file():
            raise BuildError(f"torch {torch.version}: its C++ header {header} is missing; reinstall torch")
        if not any(torch.lib.glob("libtorch_cpu.*")):
            raise BuildError(
                f"torch {torch.version}: libtorch_cpu is missing in {torch.lib}; reinstall torch"
            )
        return torch
    raise BuildError(
        f"no torch is installed for {sys.executable}, and its headers are needed to compile; "
        "`pip install torch` brings them"
    )


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX, else c++, g++ or clang++ on PATH.

    Raises:
        BuildError: there is none.
    """
    asked = tuple(shlex.split(os.environ.get("CXX", "")))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(
                f"CXX: expected a C++ compiler's command, got {os.environ['CXX']!r}, which is not on PATH"
            )
        return asked
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return (path,)
    raise BuildError(
        "no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on PATH; install one that knows "
        "C++20 (`apt-get install g++`, `dnf install gcc-c++`, `xcode-select --install`), or set CXX"
    )


def find_ninja() -> Path:
    """The ninja program: that of the Python package, else the one on PATH.

    Raises:
        BuildError: there is none.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja  # the package knows where it put its program

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.is_file():
            return program
    path = shutil.which("ninja")
    if path is None:
        raise BuildError("ninja, which runs the compiler, is missing; `pip install ninja` brings it")
    return Path(path)
