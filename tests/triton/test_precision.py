"""Gradients in half precision, dtypes, ranges and degenerate rotations. Run by test_interpreter.py."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

import gistops
from gistops._classifier import Transform
from tests.ops import test_half_gradients as half_gradients
from tests.ops import test_ranges as ranges
from tests.ops import test_rotation_degenerate as degenerate

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", get_args(Transform))
def test_gradients_are_rounded_once(transform: str, dtype: torch.dtype, seed: int) -> None:
    for kind in ("cosine", "angle"):
        half_gradients.check_rounded_once(transform, kind, dtype, "triton", seed, rows=24)


@pytest.mark.parametrize("transform", ["rotation", "mlp"])
def test_partial_sums_beyond_float16(transform: str, seed: int) -> None:
    half_gradients.check_no_overflow_of_partial_sums(transform, "triton", seed, rows=8)


@pytest.mark.parametrize("transform", get_args(Transform))
def test_float64_in_any_argument(transform: str, seed: int) -> None:
    half_gradients.check_float64_anywhere(transform, "triton", seed)


def test_degenerate_rotations(seed: int) -> None:
    degenerate.check_without_a_plane("triton", seed)
    degenerate.check_opposite("triton", seed, torch.float32)
    degenerate.check_nearly_parallel(-1, "triton", seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_overflow_is_nan(dtype: torch.dtype, seed: int) -> None:
    ranges.check_overflow(dtype, "triton", seed)


def test_extreme_norms(seed: int) -> None:
    ranges.check_extreme_norms("triton", seed)


def test_gradient_of_a_tiny_tau(seed: int) -> None:
    ranges.check_gradient_of_a_tiny_tau("triton", seed)
    ranges.test_gradient_of_a_tau_of_zero("triton", seed)


def test_gradient_of_tau_in_several_chunks_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Half of the classes have gradients of the other sign: the sums of the chunks are far larger than the total."""
    monkeypatch.setattr("gistops.backends.chunked.scorers.CPU_CHUNK_ELEMENTS", 1)
    x, w = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(128, 2, 16, dtype=torch.bfloat16)
    w[64:] = w[:64]
    grad = torch.rand(8, 128)
    grad[:, 64:] = -0.99 * grad[:, :64]
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        tau = torch.tensor(8.0, dtype=dtype, requires_grad=True)
        logits: Any = gistops.subcenter_logits(x, w, tau, backend="triton")
        gradients.append(float(torch.autograd.grad(logits, tau, grad)[0]))
    assert gradients[0] == pytest.approx(gradients[1], rel=2**-8, abs=1e-4)
