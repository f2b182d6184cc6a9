"""Tests of the shim: fragments are laid out as the hardware does, and every planted mistake is detected."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .build import SANITIZED, build, load, sanitized_pytest
from .conftest import CUDA

NAME = "gistops_shim_cases"


def _build(cache: Path, sanitize: bool) -> Path:
    return build(NAME, [Path(__file__).with_name("shim_cases.cu")], [CUDA], sanitize, cache)


@pytest.fixture(scope="session")
def shim(cache: Path) -> ModuleType:
    return load(NAME, Path(os.environ.get(SANITIZED) or _build(cache, sanitize=False)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_fragments(dtype: torch.dtype, transposed: bool, shim: Any, seed: int) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    arrays = [x.view(torch.uint16).numpy() for x in (a, b)]
    value = torch.from_numpy(shim.product(name, *arrays, transposed))
    torch.testing.assert_close(value, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_tiles_in_shared_memory(dtype: torch.dtype, columns: int, shim: Any, seed: int) -> None:
    """Products whose last group is not waited for leave NaN."""
    a, b = torch.randn(64, 32).to(dtype), torch.randn(32, columns).to(dtype)
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    arrays = [x.view(torch.uint16).numpy() for x in (a, b)]
    value = torch.from_numpy(shim.wide_product(name, *arrays, True))
    torch.testing.assert_close(value, a.float() @ b.float(), atol=1e-4, rtol=1e-5)
    assert torch.from_numpy(shim.wide_product(name, *arrays, False)).isnan().all()


def test_roundings(shim: Any, seed: int) -> None:
    special = torch.tensor(
        [0.0, -0.0, 1.0, 6e-8, 65519.0, 1e-40, 3.3e38, float("inf"), 1.00390625, 1.01171875]
    )
    values = torch.cat([special, torch.randn(200) * 10 ** torch.randn(200)])
    for x in values.tolist():
        assert shim.round_bf16(x) == float(torch.tensor(x).bfloat16())
        assert shim.round_f16(x) == float(torch.tensor(x).half())


def test_a_missing_barrier_changes_the_result_in_some_order(shim: Any) -> None:
    right = [(i + 1) % 64 + 1 for i in range(64)]
    results = {}
    for barrier in (True, False):
        for reverse in (False, True):
            shim.set_reverse(reverse)
            results[barrier, reverse] = shim.neighbor(barrier).tolist() == right
    shim.set_reverse(False)
    assert results[True, False]
    assert results[True, True]
    assert not (results[False, False] and results[False, True])


@pytest.mark.parametrize("by_warp", [False, True])
def test_a_barrier_that_not_all_threads_reach_raises(by_warp: bool, shim: Any) -> None:
    with pytest.raises(RuntimeError, match="a barrier that not all threads reach"):
        shim.divergent(by_warp)


def test_copies_arrive_with_the_wait(shim: Any) -> None:
    values = torch.arange(128, dtype=torch.int32).numpy()
    assert (shim.copied(values, True, True) == values).all()
    assert not (shim.copied(values, True, False)).any()  # an invalid copy writes zeros
    assert (shim.copied(values, False, True) != values).all()


def test_a_misaligned_copy_raises(shim: Any) -> None:
    with pytest.raises(RuntimeError, match="an address that is no multiple of 16"):
        shim.misaligned()


def test_shared_memory_is_limited(shim: Any) -> None:
    assert shim.beyond(256 << 10, 32, False) == -1  # more than the device has
    assert shim.beyond(256 << 10, 32, True) == -2
    assert shim.beyond(100 << 10, 32, False) == -1  # more than 48 KiB without a request
    assert shim.beyond(100 << 10, 32, True) == 1


@pytest.mark.skipif(not os.environ.get(SANITIZED), reason="run by the next test, in a new process")
def test_read_beyond_shared_memory(shim: Any) -> None:
    shim.beyond(128, 33, False)


@pytest.mark.skipif(bool(os.environ.get(SANITIZED)), reason="this is the process that the test starts")
def test_address_sanitizer_detects_a_read_beyond_shared_memory(cache: Path) -> None:
    done = sanitized_pytest(
        _build(cache, sanitize=True), [__file__, "-k", "read_beyond or fragments or copies"]
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    assert "beyond_kernel" in done.stdout + done.stderr
