"""Logits of constellations and of free centres."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends
from .._checks import check_constellation, check_subcenters, check_transform
from ..backends import reference
from . import mlp as networks
from . import rotation
from .fused import allow_tf32, fused, no_displacements

Transform = Literal["translation", "rotation", "mlp"]


@overload
def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
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
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
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
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
    return_slots: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def constellation_logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    *,
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
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
        transform: what a displacement does to a centre. "translation": w_k + δ_j. "rotation": w_k turned by the rotation
            that takes `axis` to the direction of δ_j, in their plane (equations 8 and 9, read so that it is one).
            "mlp": w_k + B relu(A [w_k / |w_k|; δ_j]), the paper's learned g: m + 1 products instead of one, in chunks.
        axis: for a rotation, the direction u that all share, [d], floating; differentiable.
        mlp: for an MLP, its weights A [h, 2 d] and B [d, h], floating; differentiable.
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
    check_transform(transform, axis, mlp, input)
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        logits, slots = reference.logits(input, centers, displacements, tau, axis, mlp)
    elif mlp is not None:
        logits, slots = networks.logits(chosen, input, centers, displacements, tau, mlp)
    elif axis is not None:
        prefix = "triton_" if chosen == "triton" else ""
        forward = getattr(torch.ops.gistops, f"{prefix}tabled_forward").default
        both = rotation.tables(input, centers, displacements, axis)
        logits, slots = forward(input, centers, tau, *both, allow_tf32(chosen))[:2]
    else:
        logits, slots = fused(chosen, input, centers, displacements, tau)
    return (logits, slots) if return_slots else logits


def subcenter_logits(
    input: Tensor,
    centers: Tensor,
    tau: Tensor | float,
    *,
    return_slots: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits of classes with centres of their own: `τ · max_j cos(f_i, w_kj)`.

    Sub-centre ArcFace (Deng, Guo, Liu, Gong, Zafeiriou, ECCV 2020), and any rule that makes M vectors for each class.
    Where they are one centre and shared displacements, `constellation_logits` takes a Mth of the time. Otherwise as
    that: dtypes, zero vectors, ties, bits and errors.

    Args:
        input: features f, [B, d], not normalised.
        centers: M centres w of each class, [K, M, d], 1 <= M <= 256; not normalised.
        tau: temperature τ > 0, a tensor of one element, or a number.
        return_slots: also return which centre won.
        backend: as in `constellation_logits`.

    Returns:
        logits [B, K], float64 if input or centers is float64, otherwise float32. With `return_slots` also slots
        [B, K], uint8.

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as `constellation_logits`.
    """
    tau = check_subcenters(input, centers, tau)
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        logits, slots = reference.subcenter_logits(input, centers, tau)
    else:
        logits, slots = fused(chosen, input, centers, no_displacements(input), tau)
    return (logits, slots) if return_slots else logits


def center_norms(centers: Tensor, displacements: Tensor) -> Tensor:
    """What the `cpu` backend needs of centres that do not change, [M, K]; for `frozen_logits` and `frozen_topk`."""
    norms: Tensor = torch.ops.gistops.constellation_norms.default(centers.detach(), displacements.detach())
    return norms


def frozen_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """logits and slots of the `cpu` backend with norms made before: the same bits, and no gradient."""
    operator = torch.ops.gistops.constellation_frozen_forward.default
    logits, slots = operator(input, centers.detach(), displacements.detach(), tau.detach(), norms)
    return logits, slots
