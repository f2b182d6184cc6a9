"""Checks of what a variant computes: against the definition in float64, or the algebra in float32 at large sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import baselines
from ..problem import Tensors, make_labels
from .variants import TABLE

#: Precision -> the largest relative error, ‖out − ref‖ / ‖ref‖, of logits, of gradients, and of the loss. bf16
#: arguments are exact in the reference, so that this is the error of what is computed from them. The variants of plain
#: PyTorch that compute in bf16 throughout err by some 1e-2 in the logits, and their routing by more.
TOLERANCE = {"bf16": (3e-2, 5e-2, 2e-2), "float32": (1e-4, 2e-3, 1e-4), "tf32": (5e-3, 0.2, 5e-3)}
CHECKED_CLASSES = 512
#: Largest B·K·M for the check of gradients, which holds that many scores in float32 several times.
CHECKED_SCORES = 1 << 26


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖. A single number, as ∂τ, may be near 0 by chance: at least 0.01 then."""
    difference = got.detach().to(wanted.dtype) - wanted
    return float(difference.norm() / wanted.norm().clamp(min=1e-30 if wanted.numel() > 1 else 1e-2))


def logits_error(logits: Tensor, arguments: Tensors) -> float:
    """Relative error of the first classes' logits, against the definition in float64."""
    x, w, delta, tau = (argument.detach() for argument in arguments)
    with torch.no_grad():
        doubles = (x.double(), w[:CHECKED_CLASSES].double(), delta.double(), tau.double())
        return relative_error(logits[:, :CHECKED_CLASSES], baselines.direct(*doubles))


def reference_gradients(arguments: Tensors) -> tuple[Tensor, ...] | None:
    """Gradients of a step in float32 by the algebra in plain PyTorch; None where they would take too much memory."""
    x, w, delta, _ = arguments
    if x.shape[0] * w.shape[0] * (delta.shape[0] + 1) > CHECKED_SCORES:
        return None
    singles = tuple(argument.detach().float().requires_grad_() for argument in arguments)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        loss = F.cross_entropy(baselines.split(*singles), make_labels(arguments))
        return torch.autograd.grad(loss, singles)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def gradients_error(arguments: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error of the gradients that a step has left in its arguments."""
    errors = [
        math.inf if argument.grad is None else relative_error(argument.grad, gradient)
        for argument, gradient in zip(arguments, wanted, strict=True)
    ]
    return max((math.inf if math.isnan(error) else error) for error in errors)


def check_call(
    name: str, kind: str, precision: str, made: Tensor, arguments: Tensors, wanted: Any
) -> dict[str, Any]:
    """`error` by what was checked, and `inexact` in words where it is too large. Nothing for other functions than ours.

    Args:
        name: of a variant.
        kind: of the call.
        precision: one of TOLERANCE.
        made: what the call returned.
        arguments: with the gradients that it left.
        wanted: the gradients, or None where they are not known.
    """
    if TABLE[name].cosine:
        return {}
    if kind == "forward":
        errors = {"logits": logits_error(made, arguments)}
    else:
        errors = {"gradients": gradients_error(arguments, wanted)} if wanted is not None else {}
    return check_errors(errors, precision)


def check_errors(errors: dict[str, float], precision: str) -> dict[str, Any]:
    """The errors as JSON can hold them, and what of them is too much."""
    most = dict(zip(("logits", "gradients", "loss"), TOLERANCE[precision], strict=True))
    # `not <=`, so that NaN is wrong too.
    wrong = [f"{what}: {error:.1e}" for what, error in errors.items() if not error <= most[what]]
    found: dict[str, Any] = {"error": {k: v if math.isfinite(v) else str(v) for k, v in errors.items()}}
    return found | ({"inexact": ", ".join(wrong)} if wrong else {})
