"""Numerical conventions that all kernels share: inverse norms, and the test for cancellation.

Kernels serve three kinds of input: half precision (float16, bfloat16), float32 and float64. `ACC` is the dtype of
accumulators: float64 for float64 inputs, otherwise float32. `WIDEN` is set under Triton's interpreter, whose bfloat16
arithmetic is wrong: every tile is converted to `ACC` right after its load.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped_rnorm(square):
    """Return 1 / max(sqrt(square), 1e-12), correctly rounded; NaN if the square has overflowed.

    NaN stays NaN; `tl.maximum` would drop it.
    """
    if square.dtype == tl.float64:
        norm = tl.sqrt(square)
        inverse = 1.0 / norm
    else:
        norm = tl.sqrt_rn(square)
        inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)
    inverse = tl.where(norm == float("inf"), tl.full(norm.shape, float("nan"), norm.dtype), inverse)
    return tl.where(norm < 1e-12, tl.full(norm.shape, 1e12, norm.dtype), inverse)


@triton.jit
def load_tau(tau, ACC: tl.constexpr):
    """Return τ, of magnitude 1e-20 at least: the backward finds the cosine of a logit by division."""
    value = tl.load(tau).to(ACC)
    tiny = tl.where(value < 0, -1e-20, 1e-20).to(ACC)
    return tl.where(tl.abs(value) < 1e-20, tiny, value)


@triton.jit
def is_clamped(rnorm):
    """Return true where the norm behind an inverse norm, of either sign, was clamped. Such a norm has no gradient."""
    return tl.abs(rnorm) >= tl.full(rnorm.shape, 1e12, rnorm.dtype)


@triton.jit
def signed_rnorm(center_square, product, displacement_square):
    """Return 1 / |w + δ| from |w|², w·δ and |δ|², or -1 where the sum has cancelled. The arguments broadcast.

    Where w is close to -δ, |w|² + 2 w·δ + |δ|² loses digits, and so do P + Q and HW + SΔ. The sign of the inverse norm
    marks such pairs, which are rare. cancellation.py recomputes them from w + δ and replaces the -1.
    """
    sum_of_squares = center_square + displacement_square
    square = sum_of_squares + 2.0 * product
    # A NaN, as the difference of two infinite squares is, has cancelled too. A NaN of the vectors themselves stays.
    cancelled = (sum_of_squares == sum_of_squares) & ((square >= sum_of_squares * 0.125) == 0)
    one = tl.full(square.shape, 1.0, square.dtype)
    return tl.where(cancelled, -one, clamped_rnorm(tl.where(cancelled, one, square)))
