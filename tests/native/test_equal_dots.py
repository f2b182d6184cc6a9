"""The dot products of the CPU kernels, by two compilers: equal vectors have equal products, so that ties stay ties."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

from gistops import _build
from gistops._toolchain import find_compiler, host_machine
from gistops.backends import native

from .test_build import needs_compiler

SOURCE = """
#include "isa/kernels.h"
#include "isa/dots.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void float32(const float* x, int64_t rows, int64_t d, const float* y, int64_t columns, float* squares, float* out) {
  dots<float>(x, rows, d, y, columns, squares, out, columns);
}
EXPORT void float64(const double* x, int64_t rows, int64_t d, const double* y, int64_t columns, double* squares, double* out) {
  dots<double>(x, rows, d, y, columns, squares, out, columns);
}
"""

#: Command, and the flag for a processor with fused multiply-adds, which compilers use for some products and not for others.
COMPILERS = {
    "gcc": (("g++",), "-march=x86-64-v3"),
    "clang": ((sys.executable, "-m", "ziglang", "c++"), "-mcpu=x86_64_v3"),
}


def compiled(compiler: str, folder: Path) -> ctypes.CDLL:
    command, processor = COMPILERS[compiler]
    flags = [*_build.compile_flags(), "-I", str(native.source_dir() / "cpu")]
    if host_machine() == "x86_64":
        if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            pytest.skip("this processor has no AVX2")
        flags.append(processor)
    source, obj, library = (str(folder / name) for name in ("dots.cpp", "dots.o", "dots.so"))
    Path(source).write_text(SOURCE, encoding="utf-8")
    done = subprocess.run(
        [*command, *flags, "-c", source, "-o", obj], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    subprocess.run([*find_compiler(), "-shared", obj, "-o", library], check=True)
    return ctypes.CDLL(library)


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
def test_equal_vectors_have_equal_products(
    compiler: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (compiler == "gcc" and shutil.which("g++") is None) or (
        compiler == "clang" and find_spec("ziglang") is None
    ):
        pytest.skip(f"{compiler} is not installed")
    for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "zig"))
    library = compiled(compiler, tmp_path)
    for dtype in (torch.float32, torch.float64):
        dots = getattr(library, str(dtype).removeprefix("torch."))
        for d, rows, columns, with_squares in product(range(1, 40), range(1, 7), range(11), (False, True)):
            x, y = (torch.randn(d, dtype=dtype).expand(n, d).contiguous() for n in (rows, columns))
            squares, out = torch.zeros(rows, dtype=dtype), torch.zeros(rows, columns, dtype=dtype)
            sizes = [ctypes.c_int64(n) for n in (rows, d, columns)]
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, squares, out)]
            dots(
                pointers[0],
                *sizes[:2],
                pointers[1],
                sizes[2],
                pointers[2] if with_squares else None,
                pointers[3],
            )
            for values in (squares, out.flatten()):
                assert (values == values[:1]).all(), f"{dtype}, {d=}, {rows=}, {columns=}: {values}"
            if columns:
                torch.testing.assert_close(out[0, 0], x[0] @ y[0])
