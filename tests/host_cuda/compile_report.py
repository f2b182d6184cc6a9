"""Report the registers, memory and spills that nvcc and ptxas print for each kernel; needs no GPU.

`python -m tests.host_cuda.compile_report` prints the table as Markdown. It takes a minute on two cores the first time;
results are cached.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gistops import _build
from gistops._toolchain import find_nvcc
from gistops.backends import native

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FOLDER = native.source_dir() / "cuda"
SOURCES = tuple(native.source_dir() / unit.source for unit in _build.CUDA if unit.source.endswith(".cu"))
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v")
WORKERS = 2  # a compilation takes one core and half a gigabyte


@dataclass(frozen=True)
class Kernel:
    """The report on one kernel for one architecture."""

    name: str
    source: str
    architecture: str
    registers: int
    shared: int  # bytes of static shared memory; dynamic shared memory is not included
    stack: int
    spilled: int  # bytes stored and loaded
    matrix_products: int  # mma.sync and wgmma instructions


def compile_kernels(source: Path, architecture: str, cache: Path | None = None) -> list[Kernel]:
    """Compile a file and return the compilers' report on each of its kernels.

    Args:
        source: A .cu file; it may include headers of its folder.
        architecture: A target such as "sm_90a".
        cache: Folder in which reports are kept, by a hash of all sources and flags.

    Raises:
        RuntimeError: With nvcc's messages, if it fails or warns.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc: expected on PATH or in CUDA_HOME, found none")
    code = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = [str(nvcc), *FLAGS, code, "-I", str(FOLDER), "-cubin", str(source)]
    kept = cache / f"ptxas-{_digest(command, source)}.json" if cache else None
    if kept and kept.exists():
        return [Kernel(**fields) for fields in json.loads(kept.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        # The PTX is read because cuobjdump, which shows the machine code, does not come with every nvcc.
        keep = ["--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run([*command, *keep], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{said[-4000:]}")
        products = count_products(Path(folder, f"{source.stem}.ptx").read_text())
    kernels = [
        Kernel(name, source.name, architecture, registers, shared, stack, spilled, products[mangled])
        for mangled, name, registers, shared, stack, spilled in read_ptxas(said)
    ]
    if not kernels:
        raise RuntimeError(f"{shlex.join(command)}\nptxas reported no kernel:\n{said[-4000:]}")
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    return kernels


def _digest(command: list[str], source: Path) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(shlex.join(command).encode() + version + Path(__file__).read_bytes())
    headers = {path for folder in {FOLDER, source.parent} for path in folder.glob("*.*h")}
    for path in sorted({source, *headers}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_ptxas(said: str) -> Iterator[tuple[str, str, int, int, int, int]]:
    """Yield the mangled name, name, registers, shared memory, stack and spilled bytes of each kernel."""
    blocks = re.split(r"Compiling entry function '", said)[1:]
    names = _demangled([block[: block.index("'")] for block in blocks])
    for block, name in zip(blocks, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", block)
        yield (
            block[: block.index("'")],
            name,
            _number(r"Used (\d+) registers", block),
            int(shared[1]) if shared else 0,
            _number(r"(\d+) bytes stack frame", block),
            _number(r"(\d+) bytes spill stores", block) + _number(r"(\d+) bytes spill loads", block),
        )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas: expected {pattern!r} in its output, got\n{text[:1000]}")
    return int(found[1])


def _demangled(names: list[str]) -> list[str]:
    """Return short names, without namespace, return type and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")[: len(names)]
    return [_before_parameters(line.replace("gistops::cuda::", "").removeprefix("void ")) for line in lines]


def _before_parameters(name: str) -> str:
    depth = 0
    for i, character in enumerate(name):
        if character == "(" and depth == 0:
            return name[:i]
        depth += {"<": 1, ">": -1}.get(character, 0)
    return name


def count_products(ptx: str) -> dict[str, int]:
    """Return the number of tensor-core instructions of each kernel."""
    kernels = re.split(r"\.entry (\w+)\(", ptx)[1:]
    return {
        name: len(re.findall(r"^\s*(?:mma\.sync|wgmma\.mma_async)", text, re.M))
        for name, text in zip(kernels[::2], kernels[1::2], strict=True)
    }


def table(kernels: Iterable[Kernel]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the kernels."""
    yield "| kernel | file | target | registers | static shared memory, B | stack, B | spilled, B | products |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for k in sorted(
        kernels, key=lambda k: (k.source, k.name, int(k.architecture.removeprefix("sm_").removesuffix("a")))
    ):
        yield (
            f"| {k.name} | {k.source} | {k.architecture} | {k.registers} | {k.shared} | {k.stack} "
            f"| {k.spilled} | {k.matrix_products or '–'} |"
        )


def main() -> None:
    cache = Path(__file__).parents[2] / ".pytest_cache/d/host_cuda"  # the tests' cache
    pairs = [(source, architecture) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(WORKERS) as pool:
        compiled = list(pool.map(lambda pair: compile_kernels(pair[0], pair[1], cache), pairs))
    print("\n".join(table(kernel for kernels in compiled for kernel in kernels)))


if __name__ == "__main__":
    main()
