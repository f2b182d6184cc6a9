"""The search for the tools of a build: torch's headers and libraries, a C++ compiler, ninja, nvcc. Does not import torch.

pip builds packages in an environment without torch, so that torch is found by its path.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MIN_TORCH = (2, 11)


class BuildError(RuntimeError):
    """The native code cannot be built. The message says what is missing, or has the compiler's errors."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, as seen by a compiler."""

    root: Path
    version: str
    cuda: str | None = None  # the CUDA version of its build, such as "13.0"

    @property
    def include(self) -> Path:
        """The folder of torch's headers."""
        return self.root / "include"

    @property
    def lib(self) -> Path:
        """The folder of torch's libraries."""
        return self.root / "lib"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that matches torch."""

    nvcc: Path
    runtime: Path  # libcudart, linked as in torch, so that both share the current device
    architectures: tuple[str, ...]  # "80", "90a", or "100+PTX", which also runs on newer GPUs

    def flags(self) -> list[str]:
        """Return nvcc's flags for the architectures."""
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX")
            code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        # The host chooses kernels with wgmma only if a Hopper GPU loads their code, and not that for sm_90.
        numbers = {architecture.removesuffix("+PTX") for architecture in self.architectures}
        return [*flags, "-DGISTOPS_SM90A=1"] if "90a" in numbers and "90" not in numbers else flags

    def __str__(self) -> str:
        return " ".join(f"sm_{architecture}" for architecture in self.architectures)


def host_machine() -> str:
    """Return the processor's architecture under one name per architecture: "x86_64", "aarch64", ..."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@dataclass(frozen=True)
class Tools:
    """The tools of a build."""

    torch: Torch
    compiler: tuple[str, ...]
    ninja: Path
    cuda: Cuda | str  # a string: why the kernels for NVIDIA GPUs cannot be compiled
    machine: str = field(default_factory=host_machine)  # the architecture that the compiler compiles for

    @classmethod
    def find(cls) -> Tools:
        """Find the tools on this machine.

        Raises:
            BuildError: a tool is missing; the message says which, and how to get it.
        """
        torch = find_torch()
        return cls(torch, find_compiler(), find_ninja(), find_cuda(torch))

    def compiler_version(self) -> str:
        """Return the first line of the compiler's `--version`."""
        answer = subprocess.run([*self.compiler, "--version"], capture_output=True, text=True, check=False)
        return (answer.stdout.splitlines() or [shlex.join(self.compiler)])[0].strip()


def _torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")  # finds it, does not import it
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip's build isolation hides torch through PYTHONPATH, but runs the interpreter of the target environment: without
    # PYTHON* variables (-E) this interpreter finds the torch that the package will run with.
    ask = "import sys, importlib.util as u; del sys.path[0]; s = u.find_spec('torch'); print(s and s.origin)"
    answer = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True, check=False)
    origin = answer.stdout.strip()
    if origin.endswith(".py"):
        yield Path(origin).parent


def find_torch() -> Torch:
    """Find the torch that the package will run with.

    Raises:
        BuildError: torch is not installed or too old, or its headers or libraries are missing.
    """
    for root in _torch_folders():
        version_file = root / "version.py"
        if not version_file.is_file():
            continue
        found = re.search(
            r"^__version__\s*=\s*['\"]([^'\"]+)", version_file.read_text(encoding="utf-8"), re.M
        )
        cuda = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)", version_file.read_text(encoding="utf-8"), re.M)
        version = found.group(1) if found else "0.0 (its version.py names none)"
        torch = Torch(root, version, cuda.group(1) if cuda else None)
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
    """Find the C++ compiler's command: $CXX, else c++, g++ or clang++ on PATH.

    Raises:
        BuildError: there is no C++ compiler.
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
        "no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on PATH; install one that supports "
        "C++20 (`apt-get install g++`, `dnf install gcc-c++`, `xcode-select --install`), or set CXX"
    )


def find_ninja() -> Path:
    """Find the ninja program: from the Python package, else on PATH.

    Raises:
        BuildError: there is no ninja.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja  # the package knows the path of its program

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.is_file():
            return program
    path = shutil.which("ninja")
    if path is None:
        raise BuildError("ninja, which runs the compiler, is missing; `pip install ninja` brings it")
    return Path(path)


#: The default of TORCH_CUDA_ARCH_LIST: Ampere, Hopper with its own instructions, Blackwell, and PTX for newer GPUs.
ARCHITECTURES = ("80", "90a", "100")


def find_nvcc() -> Path | None:
    """Find nvcc: in $CUDA_HOME, on PATH, or in the default folder of NVIDIA's installers."""
    home = os.environ.get("CUDA_HOME")
    for path in (home and shutil.which("nvcc", path=f"{home}/bin"), shutil.which("nvcc")):
        if path:
            return Path(path)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if usual.is_file() else None


def _cuda_runtime(toolkit: Path, torch: Torch, major: str) -> Path | None:
    folders = [toolkit / "lib64", toolkit / "lib", *sorted(torch.root.parent.glob("nvidia/*/lib")), torch.lib]
    for folder in folders:
        for path in (folder / f"libcudart.so.{major}", folder / "libcudart.so"):
            if path.is_file():
                return path
    return None


def _architectures(nvcc: Path) -> tuple[str, ...]:
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked != [""]:
        for name in asked:
            if re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name) is None or float(name[: name.index(".") + 2]) < 8:
                raise BuildError(
                    "TORCH_CUDA_ARCH_LIST: expected compute capabilities of at least 8.0, such as '8.0;9.0+PTX', "
                    f"got {name!r}"
                )
        return tuple(name.replace(".", "") for name in asked)
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = [a for a in ARCHITECTURES if f"compute_{a.removesuffix('a')}\n" in listed.stdout]
    portable = [a for a in known if not a.endswith("a")]  # the PTX of the others runs on no newer GPU
    return tuple(f"{a}+PTX" if a == portable[-1] else a for a in known) if portable else ()


def find_cuda(torch: Torch) -> Cuda | str:
    """Find a CUDA toolkit that matches `torch`. If there is none, return the reason.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST has an unsupported architecture.
    """
    if os.environ.get("GISTOPS_CUDA") == "0":
        return "GISTOPS_CUDA=0 left them out"
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return (
            f"nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda); install CUDA's toolkit {torch.cuda}, then "
            "reinstall gistops"
        )
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    major = torch.cuda.split(".")[0]
    if release is None or release.group(1) != major:
        got = release.group(0) if release else said.strip() or "no answer"
        return f"torch {torch.version} is built with CUDA {torch.cuda}, and {nvcc} is from another version: {got}"
    home = re.search(r"^#\$ TOP=(.*)$", _dry_run(nvcc), re.M)
    toolkit = (nvcc.resolve().parent / home.group(1)).resolve() if home else nvcc.resolve().parent.parent
    runtime = _cuda_runtime(toolkit, torch, major)
    if runtime is None:
        return f"libcudart.so.{major} was found neither beside {nvcc} nor beside torch {torch.version}"
    architectures = _architectures(nvcc)
    if not architectures:
        return f"{nvcc} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}"
    return Cuda(nvcc, runtime, architectures)


def _dry_run(nvcc: Path) -> str:
    """Return nvcc's account of its folders; the nvcc on PATH may be a script in another folder."""
    done = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True, check=False
    )
    return done.stderr
