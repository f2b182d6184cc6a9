"""Logits of constellations and of free centres."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends
from .._checks import check_constellation, check_subcenters
from .._classifier import Classifier, Transform
from ..backends import reference
from .transforms import mlp as mlp_transform
from .transforms import rotation


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
    classifier = check_constellation(input, centers, displacements, tau, transform, axis, mlp)
    logits, slots = _logits(input, classifier, backend)
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
    logits, slots = _logits(input, check_subcenters(input, centers, tau), backend)
    return (logits, slots) if return_slots else logits


def _logits(input: Tensor, classifier: Classifier, backend: str | None) -> tuple[Tensor, Tensor]:
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        return reference.logits(input, classifier)
    ops, allow_tf32 = backends.ops(chosen), backends.allow_tf32(chosen)
    centers, displacements, tau = classifier[:3]
    if classifier.transform == "translation":
        outputs = ops.logits_forward.default(input, centers, displacements, tau, allow_tf32)
    elif classifier.transform == "subcenters":
        outputs = ops.subcenter_forward.default(input, centers, tau, allow_tf32)
    elif classifier.transform == "rotation":
        coefficients = rotation.coefficients(input, classifier)
        outputs = ops.rotation_forward.default(input, centers, tau, *coefficients, allow_tf32)
    else:
        outputs = mlp_transform.logits(ops, input, classifier, allow_tf32)
    return outputs[0], outputs[1]


def center_norms(classifier: Classifier) -> Tensor:
    """Return the norms [M, K] of frozen centers on the CPU, for `frozen_logits` and for top-k."""
    centers, displacements = classifier.centers.detach(), classifier.displacements.detach()
    norms: Tensor = torch.ops.gistops.center_norms.default(centers, displacements)
    return norms


def frozen_logits(input: Tensor, classifier: Classifier, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and slots by the `cpu` backend from `center_norms`: the same bits, but not differentiable."""
    tensors = (t.detach() for t in classifier[:3])
    logits, slots = torch.ops.gistops.frozen_logits.default(input, *tensors, norms)
    return logits, slots
