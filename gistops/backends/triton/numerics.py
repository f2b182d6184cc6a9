"""What all kernels agree on: how a norm is inverted, and when a sum has cancelled.

Kernels are written for three kinds of input: half (float16, bfloat16), float32 and float64. `ACC` is the dtype of sums,
float64 for float64 and float32 otherwise. `WIDEN` is set under Triton's interpreter, whose bfloat16 arithmetic is
wrong: there every tile is converted to `ACC` as soon as it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamped_rnorm(square):
    """1 / max(sqrt(square), 1e-12), correctly rounded; NaN stays NaN, which `tl.maximum` would drop."""
    if square.dtype == tl.float64:
        norm = tl.sqrt(square)
        inverse = 1.0 / norm
    else:
        norm = tl.sqrt_rn(square)
        inverse = tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)
    return tl.where(norm < 1e-12, tl.full(norm.shape, 1e12, norm.dtype), inverse)


@triton.jit
def is_clamped(rnorm):
    """Whether the norm behind a reciprocal, of either sign, was clamped: then it is a constant, without gradient."""
    return tl.abs(rnorm) >= tl.full(rnorm.shape, 1e12, rnorm.dtype)


@triton.jit
def signed_rnorms(center_squares, products, displacement_squares):
    """1 / |w + δ| from |w|² [k], w·δ [k, j] and |δ|² [j]; -1, to be replaced, where the sum has cancelled.

    Where w is close to -δ, |w|² + 2 w·δ + |δ|² loses digits, and so do P + Q and HW + SΔ. Such pairs, rare or none,
    are marked by the sign of their reciprocal norm, and computed from w + δ written out (cancellation.py).
    """
    apart = center_squares[:, None] + displacement_squares[None, :]
    squares = apart + 2.0 * products
    cancelled = squares < apart * 0.125
    one = tl.full(squares.shape, 1.0, squares.dtype)
    return tl.where(cancelled, -one, clamped_rnorm(tl.where(cancelled, one, squares)))
