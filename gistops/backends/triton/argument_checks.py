"""The checks that memory safety rests on, for callers of `torch.ops.gistops_triton`: kernels read what sizes tell them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..._checks import FLOAT_DTYPES, MAX_SLOTS
from ...operators.cross_entropy import CrossEntropyBackward, CrossEntropyForward, padded_rows


def check_vectors(input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor) -> None:
    """Check the arguments of the logits.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    if input.dim() != 2 or input.shape[1] < 1:
        raise RuntimeError(f"input: expected shape [B, d] with d >= 1, got {list(input.shape)}")
    d = input.shape[1]
    for name, x, rows in (("centers", centers, "K"), ("displacements", displacements, "m")):
        if x.dim() != 2 or x.shape[1] != d:
            raise RuntimeError(f"{name}: expected shape [{rows}, {d}], got {list(x.shape)}")
    if displacements.shape[0] >= MAX_SLOTS:
        raise RuntimeError(
            f"displacements: expected at most {MAX_SLOTS - 1} rows, got {displacements.shape[0]}"
        )
    if tau.numel() != 1:
        raise RuntimeError(f"tau: expected one element, got shape {list(tau.shape)}")
    for name, x in (("input", input), ("centers", centers), ("displacements", displacements), ("tau", tau)):
        if x.dtype not in FLOAT_DTYPES:
            raise RuntimeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}")
        if x.device != input.device:
            raise RuntimeError(f"{name}: expected device {input.device} to match input, got {x.device}")


def check_shapes(
    device: torch.device, expected: Iterable[tuple[str, Tensor | None, tuple[int, ...]]]
) -> None:
    """Check the names, tensors and shapes of optional arguments.

    Raises:
        RuntimeError: a shape or device does not fit.
    """
    for name, x, shape in expected:
        if x is not None and tuple(x.shape) != shape:
            raise RuntimeError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
        if x is not None and x.device != device:
            raise RuntimeError(f"{name}: expected device {device} to match input, got {x.device}")


def check_subcenters(a: CrossEntropyForward | CrossEntropyBackward) -> None:
    """Check centers [K, M, d] of a loss. Raises as `check_vectors`."""
    K, M, d = a.centers.shape
    if not 1 <= M <= MAX_SLOTS or a.input.shape[1:] != (d,):
        expected = f"[K, M, {list(a.input.shape)[-1]}] with M from 1 to {MAX_SLOTS}"
        raise RuntimeError(f"centers: expected shape {expected}, got {[K, M, d]}")
    if a.displacements.shape[0] > 0:
        raise RuntimeError(f"centers: expected shape [K, {d}] with displacements, got {[K, M, d]}")


def check_coeffs(a: CrossEntropyForward | CrossEntropyBackward) -> None:
    """Check the coefficients of rotations in a loss. Raises as `check_vectors`."""
    x, y = a.input_coeffs, a.class_coeffs
    if x is None or y is None:
        if x is not None or y is not None:
            raise RuntimeError("input_coeffs, class_coeffs: expected both or neither, got one")
        return
    if a.centers.dim() != 2 or a.displacements.shape[0] > 0:
        got = f"{list(a.centers.shape)} and {list(a.displacements.shape)}"
        raise RuntimeError(f"input_coeffs: expected centers [K, d] and no displacements, got {got}")
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_SLOTS:
        expected = f"[B, M] with M from 1 to {MAX_SLOTS}"
        raise RuntimeError(f"input_coeffs: expected shape {expected}, got {list(x.shape)}")
    B, K, M = a.input.shape[0], a.centers.shape[0], x.shape[1]
    for name, coeffs in (("input_coeffs", x), ("class_coeffs", y)):
        if coeffs.dtype not in FLOAT_DTYPES:
            raise RuntimeError(f"{name}: expected float32, float16, bfloat16 or float64, got {coeffs.dtype}")
    check_shapes(a.input.device, (("input_coeffs", x, (B, M)), ("class_coeffs", y, (2, M, K))))


def check_loss(a: CrossEntropyForward | CrossEntropyBackward) -> None:
    """Check the arguments of a loss besides those of the logits. Raises as `check_shapes`."""
    B, K = a.input.shape[0], a.centers.shape[0]
    if K < 1:
        raise RuntimeError("centers: expected at least one class, got none")
    if a.target.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"target: expected int64 or int32, got {a.target.dtype}")
    margin = () if a.margin is None or a.margin.dim() == 0 else (1,) if a.margin.shape == (1,) else (K,)
    vectors = ("class_bias", a.class_bias, (K,)), ("weight", a.weight, (K,)), ("margin", a.margin, margin)
    check_shapes(a.input.device, (("target", a.target, (B,)), *vectors))


def check_saved_loss(a: CrossEntropyBackward) -> None:
    """Check the gradients of a loss and what its forward saved. Raises as `check_shapes`."""
    B, K, M = a.input.shape[0], a.centers.shape[0], a.displacements.shape[0] + 1
    scores = (K, padded_rows(B)) if a.scores.numel() else tuple(a.scores.shape)
    if a.centers.dim() == 3:
        M = a.centers.shape[1]
    expected = (
        ("grad_loss", a.grad_loss, (B,) if a.reduction == 0 else ()), ("grad_lse", a.grad_lse, (B,)),
        ("lse", a.lse, (B,)), ("scores", a.scores, scores), ("slots", a.slots, scores),
        ("center_rnorms", a.center_rnorms, (M, K)), ("input_rnorms", a.input_rnorms, (B,)),
        ("rows", a.rows, (2 if a.margin is None else 5, B)), ("scalars", a.scalars, (2,)),
    )  # fmt: skip
    check_shapes(a.input.device, expected)
