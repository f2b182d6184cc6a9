"""The public operators."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import backends
from ._checks import check_constellation
from .backends import reference


@overload
def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    return_slots: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    return_slots: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    return_slots: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    return_slots: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits of a constellation classifier: `τ · max_j cos(f_i, w_k + δ_j)`, with `δ_0 = 0`.

    GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021), equations 4 to 7. Differentiable once in every floating
    argument. Norms are clamped at 1e-12, so that a zero vector scores 0. The same inputs give the same bits.

    Args:
        input: features f, [B, d], float32, float16, bfloat16 or float64; not normalised.
        centers: class centres w, [K, d]; the dtype may differ from input's.
        displacements: displacements δ shared by all classes, [m, d], 0 <= m <= 255. m = 0 is a cosine classifier.
        tau: temperature τ > 0, a tensor of one element, or a number.
        return_slots: also return which vector won.
        backend: "cpu", "cuda", "triton", "reference", or None for the best one for input's device.

    Returns:
        logits [B, K], float64 if input, centers or displacements is float64, otherwise float32. With `return_slots`
        also slots [B, K], uint8: 0 for the bare centre, j for `w_k + δ_j`; the lowest of equals.

    Raises:
        TypeError: an argument is no dense floating-point tensor.
        ValueError: shapes or devices do not fit, or an unknown backend; the message names the argument.
        gistops.BackendUnavailable: the backend asked for cannot serve here.
    """
    tau = check_constellation(input, centers, displacements, tau)
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        logits, slots = reference.constellation_logits(input, centers, displacements, tau)
    else:
        operators = torch.ops.gistops
        forward = operators.triton_forward if chosen == "triton" else operators.constellation_forward
        allow_tf32 = chosen != "cpu" and backends.allow_tf32()
        logits, slots = forward.default(input, centers, displacements, tau, allow_tf32)[:2]
    return (logits, slots) if return_slots else logits
