"""The build of `csrc/` into one shared library, against the installed torch.

setup.py calls it when the package is installed; backends/native.py calls it on first use if that was not possible.
The library uses only torch's stable ABI: one library serves all supported versions of torch, on any Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ._toolchain import BuildError, Tools, host_machine

STABLE_ABI = "0x020a000000000000"  # torch 2.10: the library loads on this version and on later ones
SOURCE_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


@dataclass(frozen=True)
class Unit:
    """One object file."""

    name: str
    source: str
    flags: tuple[str, ...] = ()  # in addition to those of every unit
    torch_headers: bool = False  # may include torch's headers
    cuda: bool = False  # belongs to the backend for NVIDIA GPUs


COMMON = (
    Unit("schema", "schema.cpp", torch_headers=True),
    Unit("cpu_logits_ops", "cpu/binding/logits_ops.cpp", torch_headers=True),
    Unit("cpu_cross_entropy_ops", "cpu/binding/cross_entropy_ops.cpp", torch_headers=True),
    Unit("cpu_rotation_ops", "cpu/binding/rotation_ops.cpp", torch_headers=True),
    Unit("cpu_dispatch", "cpu/dispatch.cpp"),
)


def _kernels(isa: str, *flags: str) -> Unit:
    # -fno-math-errno: a square root is one instruction, also of vectors.
    return Unit(
        f"cpu_kernels_{isa}", "cpu/isa/kernels.cpp", (f"-DGISTOPS_ISA={isa}", "-fno-math-errno", *flags)
    )


# The files in cpu/isa/ are compiled once per instruction set, and cpu/dispatch.cpp picks a copy at run time, so that
# a library built on one machine runs on every other machine of its architecture. For the same reason they include
# nothing from outside of their folder but C and C++ headers, and they define everything in an unnamed namespace: the
# linker keeps one copy of an inline function, from any object file, and an AVX-512 copy would crash an older machine.
# Tests check the includes and look for weak symbols.
BASELINE = (_kernels("baseline"),)
X86_64 = (
    *BASELINE,
    _kernels("v3", "-march=x86-64-v3"),
    _kernels("v4", "-march=x86-64-v4", "-mprefer-vector-width=512"),
)
CUDA = (
    Unit("cuda_logits_ops", "cuda/logits_ops.cpp", torch_headers=True, cuda=True),
    Unit("cuda_cross_entropy_ops", "cuda/cross_entropy_ops.cpp", torch_headers=True, cuda=True),
    Unit("cuda_topk_ops", "cuda/topk_ops.cpp", torch_headers=True, cuda=True),
    *(Unit(f"cuda_{t}", f"cuda/{t}.cu", cuda=True) for t in ("bf16", "f16", "f32", "f64")),
)


def units(cuda: bool = False, machine: str | None = None) -> tuple[Unit, ...]:
    """Return the units for an architecture (None: this one's), with or without the backend for NVIDIA GPUs."""
    cpu = COMMON + (X86_64 if (machine or host_machine()) == "x86_64" else BASELINE)
    return cpu + CUDA if cuda else cpu


def compile_flags(machine: str | None = None) -> tuple[str, ...]:
    """Return the flags of every unit for an architecture (None: this one's).

    They depend on nothing else about the compiling machine (no -march=native).
    """
    flags = (
        "-std=c++20",
        "-O3",
        "-ffp-contract=fast",  # GCC's ISO modes otherwise emit no fused multiply-adds
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    )
    return (*flags, "-DGISTOPS_X86=1") if (machine or host_machine()) == "x86_64" else flags


def nvcc_flags() -> tuple[str, ...]:
    """Return the flags of every CUDA unit, without the architectures."""
    return ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")


def link_flags() -> tuple[str, ...]:
    """Return the flags of the link step."""
    # defs: a missing function is an error at link time, not at load time.
    # no-as-needed: on a CUDA torch, libtorch loads libtorch_cuda, whose functions are looked up at the first call.
    linux = ("-Wl,-z,defs", "-Wl,--no-as-needed")
    # The linker of macOS also refuses the weak functions of cpu/gemm.h if torch lacks them, unless it may leave every
    # missing function to the load.
    macos = ("-Wl,-undefined,dynamic_lookup",)
    system = macos if sys.platform == "darwin" else linux
    return (*system, "-ltorch", "-ltorch_cpu", "-lc10")


def sources(src: Path) -> list[Path]:
    """Return the source files in `src`, relative to it, in a fixed order."""
    return sorted(path.relative_to(src) for path in src.rglob("*") if path.suffix in SOURCE_SUFFIXES)


def source_hash(src: Path, machine: str | None = None) -> str:
    """Return a hash of everything that determines a build of `src` for `machine`, except torch and the compiler."""
    flags = (compile_flags(machine), nvcc_flags(), link_flags())
    digest = hashlib.sha256(repr((units(True, machine), *flags)).encode())
    for path in sources(src):
        digest.update(f"\0{path.as_posix()}\0".encode() + (src / path).read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """The origin of a library, stored beside `_C.so` as `_C.json`."""

    source_hash: str
    torch: str
    compiler: str
    cuda: str  # the library's GPU architectures, such as "sm_80 sm_90a", or why it has none

    @staticmethod
    def path(library: Path) -> Path:
        """Return the path of the record of `library`."""
        return library.with_suffix(".json")

    @classmethod
    def read(cls, library: Path) -> Record | None:
        """Return the record of `library`, or None if it cannot be read."""
        try:
            data = json.loads(cls.path(library).read_text(encoding="utf-8"))
            return cls(**{name: str(data[name]) for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, library: Path) -> None:
        """Write this record beside `library`."""
        self.path(library).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _escape(path: Path) -> str:
    """Escape a path for ninja's build lines."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _command(*words: str | Path) -> str:
    """Escape a command line for ninja's rules."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _compile_command(unit: Unit, source: Path, obj: Path, tools: Tools, src: Path) -> str:
    output = ("-MD", "-MF", obj.with_suffix(".d"), "-c", source, "-o", obj)
    if source.suffix == ".cu":
        assert not isinstance(tools.cuda, str)
        compiler = ("-ccbin", tools.compiler[0])
        return _command(tools.cuda.nvcc, *compiler, *nvcc_flags(), *tools.cuda.flags(), *output)
    # Checks put the name of their file into Python's messages; the folder of the build is left out.
    flags = [*compile_flags(tools.machine), *unit.flags, f"-ffile-prefix-map={src}=csrc"]
    if unit.torch_headers:
        flags += ["-isystem", str(tools.torch.include)]
    return _command(*tools.compiler, *flags, *output)


def _write_ninja(src: Path, out: Path, tmp: Path, tools: Tools) -> None:
    lines = []
    objects = []
    cuda = () if isinstance(tools.cuda, str) else (tools.cuda.runtime,)
    for unit in units(bool(cuda), tools.machine):
        obj, source = tmp / f"{unit.name}.o", src / unit.source
        lines += [
            f"rule {unit.name}",
            f"  command = {_compile_command(unit, source, obj, tools, src)}",
            f"  depfile = {_escape(obj.with_suffix('.d'))}",
            "  deps = gcc",
        ]
        lines += [f"build {_escape(obj)}: {unit.name} {_escape(source)}", ""]
        objects.append(obj)
    libraries = (f"-L{tools.torch.lib}", *link_flags(), *cuda)
    lines += [
        "rule link",
        f"  command = {_command(*tools.compiler, '-shared', *objects, '-o', out, *libraries)}",
    ]
    lines += [f"build {_escape(out)}: link {' '.join(map(_escape, objects))}", ""]
    (tmp / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


def _explain(output: str) -> str:
    """Extract the first error lines and the failed command from ninja's output."""
    first = r"^FAILED:.*\n(?P<command>.*)\n(?P<said>(?s:.*?))(?=^\[\d+/\d+\]|^FAILED:|^ninja: |\Z)"
    failed = re.search(first, output, re.M)
    if failed is None:
        return output.strip()[-2000:]
    said = failed["said"].splitlines()
    errors = [line for line in said if re.search(r"error|undefined reference|cannot find|not found", line)]
    shown = "\n".join(f"  {line}" for line in (errors or said)[:8])
    return f"{shown}\n  command: {failed['command']}"


def build(src: Path, out: Path, tmp: Path, tools: Tools | None = None, strict: bool = False) -> Record:
    """Compile `src` into the library `out`, and write its record beside it.

    Args:
        src: the folder of the C++ sources.
        out: the path of the library.
        tmp: the folder for object files. Object files from an earlier build of the same sources are reused.
        tools: the tools to build with; None finds them.
        strict: if nvcc is present and the kernels for NVIDIA GPUs do not compile, raise an error. If not strict, the
            library is built without them and the record says why.

    Raises:
        BuildError: torch, a compiler or ninja is missing, or the compilation failed.
    """
    tools = tools or Tools.find()
    wanted = dict.fromkeys(unit.source for unit in units(not isinstance(tools.cuda, str), tools.machine))
    missing = [source for source in wanted if not (src / source).is_file()]
    if missing:
        raise BuildError(f"{src}: C++ sources are missing: {', '.join(missing)}")
    src, out, tmp = src.resolve(), out.absolute(), tmp.absolute()
    tmp.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    error = _run_ninja(src, out, tmp, tools)
    if error and not isinstance(tools.cuda, str) and not strict:
        tools = replace(tools, cuda=f"compiling them failed:\n{error}")
        error = _run_ninja(src, out, tmp, tools)
    if error:
        raise BuildError(f"compiling gistops' C++ code for torch {tools.torch.version} failed:\n{error}")
    record = Record(
        source_hash(src, tools.machine), tools.torch.version, tools.compiler_version(), str(tools.cuda)
    )
    record.write(out)
    return record


def _run_ninja(src: Path, out: Path, tmp: Path, tools: Tools) -> str | None:
    """Write the build's commands and run them. Return the errors, or None."""
    _write_ninja(src, out, tmp, tools)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
    done = subprocess.run(
        [str(tools.ninja), "-C", str(tmp), *jobs],
        env={**os.environ, "LC_ALL": "C"},  # _explain() searches for error lines in English
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return _explain(done.stdout) if done.returncode else None
