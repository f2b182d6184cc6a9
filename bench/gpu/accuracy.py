"""The accuracy of a variant's results: logits against the float64 definition, gradients against float32 at large sizes."""

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

#: Precision -> largest relative error ‖out − ref‖ / ‖ref‖ of the logits, the gradients and the loss. The reference uses
#: the same bf16 arguments, so that the error is that of the computation. PyTorch code that computes in bf16 throughout
#: has an error of about 1e-2 in the logits, and more in the gradients.
TOLERANCE = {"bf16": (3e-2, 5e-2, 2e-2), "float32": (1e-4, 2e-3, 1e-4), "tf32": (5e-3, 0.2, 5e-3)}
CHECKED_CLASSES, CHECKED_ROWS = 512, 32
#: Largest B·K·M whose gradients are checked: the check materializes several float32 tensors of this size.
CHECKED_SCORES = 1 << 26


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return ‖got − wanted‖ / ‖wanted‖. For a scalar such as ∂τ, which may be near 0, the divisor is at least 0.01."""
    difference = got.detach().to(wanted.dtype) - wanted
    return float(difference.norm() / wanted.norm().clamp(min=1e-30 if wanted.numel() > 1 else 1e-2))


def logits_error(logits: Tensor, arguments: Tensors) -> float:
    """Return the relative error of the first classes' logits against the float64 definition."""
    x, w, delta, tau = (argument.detach() for argument in arguments)
    with torch.no_grad():
        doubles = (x.double(), w[:CHECKED_CLASSES].double(), delta.double(), tau.double())
        return relative_error(logits[:, :CHECKED_CLASSES], baselines.direct(*doubles))


def best_errors(best: tuple[Tensor, ...], wanted: Tensor) -> dict[str, float]:
    """Return the relative errors of the best values, and of the logits of the best classes, against logits [B, K]."""
    values, classes = best
    largest = wanted.topk(values.shape[1]).values
    return {
        "values": relative_error(values, largest),
        "classes": relative_error(wanted.gather(1, classes), largest),
    }


def best_error(best: tuple[Tensor, ...], arguments: Tensors) -> float:
    """Return the relative error of the first rows' best values as logits of their classes, by the float64 definition."""
    x, w, delta, tau = (argument.detach() for argument in arguments)
    values, classes = (found[:CHECKED_ROWS] for found in best)
    rows = [
        baselines.direct(row[None].double(), w[found].double(), delta.double(), tau.double())
        for row, found in zip(x[:CHECKED_ROWS], classes, strict=True)
    ]
    return relative_error(values, torch.cat(rows))


def reference_gradients(arguments: Tensors) -> tuple[Tensor, ...] | None:
    """Compute the gradients of a step in float32 in plain PyTorch. None if they would need too much memory."""
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
    """Return the largest relative error of the gradients in `arguments`."""
    errors = [
        math.inf if argument.grad is None else relative_error(argument.grad, gradient)
        for argument, gradient in zip(arguments, wanted, strict=True)
    ]
    return max((math.inf if math.isnan(error) else error) for error in errors)


def check_call(
    name: str, kind: str, precision: str, output: Any, arguments: Tensors, wanted: Any
) -> dict[str, Any]:
    """Check the result of a call. Variants that compute another function are not checked.

    Args:
        name: name of a variant.
        kind: kind of the call.
        precision: a key of TOLERANCE.
        output: return value of the call.
        arguments: arguments of the call, with the gradients that it left.
        wanted: the expected gradients, or None if they are not known.

    Returns:
        `error` per checked quantity; `inexact` describes the errors above the tolerance.
    """
    if TABLE[name].cosine or TABLE[name].vectors:
        return {}
    if kind == "forward":
        errors = {"logits": logits_error(output, arguments)}
    elif kind == "topk":
        errors = {"values": best_error(output, arguments)}
    else:
        errors = {"gradients": gradients_error(arguments, wanted)} if wanted is not None else {}
    return check_errors(errors, precision)


def check_errors(errors: dict[str, float], precision: str) -> dict[str, Any]:
    """Return the errors in a form that JSON can hold, and a description of those above the tolerance."""
    most = dict(zip(("logits", "gradients", "loss"), TOLERANCE[precision], strict=True))
    most |= dict.fromkeys(("values", "classes"), most["logits"])
    # `not <=` includes NaN.
    wrong = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= most[name]]
    found: dict[str, Any] = {"error": {k: v if math.isfinite(v) else str(v) for k, v in errors.items()}}
    return found | ({"inexact": ", ".join(wrong)} if wrong else {})
