"""Tests that nvcc compiles the kernels for each GPU architecture without warnings, spills or missing tensor cores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from gistops._toolchain import find_nvcc

from . import compile_report
from .compile_report import ARCHITECTURES, SOURCES, WORKERS, Kernel, compile_kernels

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt of binutils is not installed"),
]

#: Kernels without problems, a kernel with an array in local memory, and a kernel that causes a warning.
SAMPLE = r"""
#include "ptx.cuh"
__global__ void plain(float* x) { x[threadIdx.x] *= 2; }
__global__ void product(float* x) {
  __shared__ float sums[32];
  float c[4] = {};
  const uint32_t a[4] = {threadIdx.x}, b[2] = {threadIdx.x};
  gistops::cuda::mma_16816<gistops::cuda::bf16>(c, a, b);
  sums[threadIdx.x] = c[0];
  __syncwarp();
  x[threadIdx.x] = sums[31 - threadIdx.x];
}
"""
LOCAL = r"""
__global__ void local(float* x, const int* order) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[order[i]] = x[i];
  for (int i = 0; i < 64; ++i) x[i] = kept[order[64 + i]];
}
"""
WARNS = "__global__ void warns(int* x) { int unused = 1; x[0] = 2; }"


@pytest.fixture(scope="session")
def compiled(cache: Path) -> Iterator[Callable[[Path, str], list[Kernel]]]:
    """Start all compilations at the first test, WORKERS at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures: dict[tuple[Path, str], Future[list[Kernel]]] = {
            (source, architecture): pool.submit(compile_kernels, source, architecture, cache)
            for architecture in ARCHITECTURES
            for source in SOURCES
        }
        yield lambda source, architecture: futures[source, architecture].result()
        pool.shutdown(cancel_futures=True)  # those that no test requested


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels(architecture: str, source: Path, compiled: Callable[[Path, str], list[Kernel]]) -> None:
    kernels = compiled(source, architecture)
    in_local_memory = [k for k in kernels if k.stack or k.spilled]
    assert not in_local_memory, "\n".join(compile_report.table(in_local_memory))
    multiplies = [k for k in kernels if k.name.startswith("grad_centers_kernel")]
    assert bool(multiplies) == (source.stem in ("bf16", "f16"))  # the library computes all other products
    assert all(k.matrix_products for k in multiplies)


def test_report_on_a_sample(tmp_path: Path) -> None:
    source = tmp_path / "sample.cu"
    source.write_text(SAMPLE + LOCAL)
    cache = tmp_path / "kept"
    kernels = {k.name: k for k in compile_kernels(source, "sm_80", cache)}
    assert kernels.keys() == {"plain", "product", "local"}
    assert kernels["product"].matrix_products == 1
    assert kernels["product"].shared == 128
    plain = kernels["plain"]
    assert (plain.matrix_products, plain.shared, plain.stack, plain.spilled) == (0, 0, 0, 0)
    assert 0 < plain.registers < 32
    assert kernels["local"].stack == 256
    assert {k.name: k for k in compile_kernels(source, "sm_80", cache)} == kernels  # from the cache
    assert len(list(cache.iterdir())) == 1
    source.write_text(SAMPLE)
    assert len(compile_kernels(source, "sm_80", cache)) == 2
    lines = list(compile_report.table(kernels.values()))
    assert len(lines) == len(kernels) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "warns.cu"
    source.write_text(WARNS)
    with pytest.raises(RuntimeError, match="unused"):
        compile_kernels(source, "sm_80")
