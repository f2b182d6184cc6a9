"""Logits of constellations and of sub-centers."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends
from .._checks import check_constellation, check_subcenters
from .._classifier import Classifier, Transform
from .._functorch import transforms_active, unsupported_transform
from ..backends import reference
from .leading import restore, rows
from .logits_dtype import check_logits_dtype
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
    logits_dtype: torch.dtype | None = None,
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
    logits_dtype: torch.dtype | None = None,
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
    logits_dtype: torch.dtype | None = None,
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
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the logits of a constellation classifier: `τ · max_j cos(f_i, w_k + δ_j)`, with `δ_0 = 0`.

    GistNet (Liu, Li, Kang, Hua, Vasconcelos, ICCV 2021), equations 4 to 7. A *slot* is one of the m + 1 vectors of a
    class: slot 0 is the bare center w_k, slot j is w_k + δ_j. A class's logit is the scaled cosine of the slot that is
    closest to the input. Differentiable once in every floating-point argument. Norms are clamped at 1e-12, so a zero
    vector scores 0. The square of a norm must be finite in the dtype of the logits (norms up to 1.8e19 in float32, 1.3e154
    in float64); beyond this range, logits are NaN. Results are deterministic.

    Derivatives beyond the first reverse-mode gradient need the reference backend, which has all of them. Inside
    `torch.func.grad`, `vjp`, `jacrev`, `jvp`, `jacfwd` and `hessian` and inside `torch.autograd.forward_ad`, backend None
    chooses it: exact, but slower, and its memory grows with B·K·M. For `create_graph=True` outside `torch.func`, pass
    backend="reference". `torch.vmap` alone and `is_grads_batched` call the fused ops once per sample.

    Args:
        input: features f, [..., d], float32, float16, bfloat16 or float64; not normalized.
        centers: class centers w, [K, d]; their dtype may differ from that of input.
        displacements: displacements δ, shared by all classes, [m, d] with 0 <= m <= 255. If m is 0, this is a cosine
            classifier.
        tau: temperature τ > 0, a tensor of one element or a number, of Python or numpy. A tensor's value is checked on
            the CPU in eager mode alone; elsewhere a τ of 0 gives logits of up to 1e-20, and a finite gradient of τ. Inside
            torch.compile, a scalar of numpy counts as a tensor.
        transform: the transform that makes slot j of a center and a displacement. "translation": w_k + δ_j. "rotation":
            w_k rotated in the plane of `axis` and δ_j, by the angle from `axis` to δ_j (equations 8 and 9, read as a
            rotation). If the norm of `axis` or δ_j is at most 1e-12, slot j is w_k itself, and slot 0 wins the tie. If δ_j
            is opposite to `axis` (their unit vectors add up to a norm of at most 1e-12), the rotation is by π in the plane
            of `axis` and the coordinate axis in which `axis` has its smallest component. "mlp": w_k + B relu(A [w_k / |w_k|;
            δ_j]), the paper's learned g; takes m + 1 matrix products instead of one, in chunks of classes.
        axis: the direction u of a rotation, shared by all classes, [d], floating-point; differentiable.
        mlp: the weights A [h, 2 d] and B [d, h] of an MLP, floating-point; differentiable.
        return_slots: also return the slot of each logit.
        logits_dtype: the dtype of the logits. By default it is float64 if input, centers, displacements, axis or a weight of
            the MLP is float64, otherwise float32. The only other choice is the dtype that `torch.nn.functional.linear`
            returns: that of input, or inside autocast that of autocast unless input is float64. bfloat16 logits take half
            the memory. They are the float32 logits, rounded once: a relative error of up to 2^-8 (float16: 2^-11 for normal
            numbers). The backward multiplies these rounded logits with their gradient, in the gradient of tau and in those
            terms of the gradients of centers and displacements that come from the norms, which then have the same
            relative error.
        backend: "cpu", "cuda", "triton", "reference", or None for the best one on the device of input.

    Returns:
        Logits [..., K] in `logits_dtype`. The backward reads them: add to them out of place (`logits + prior`), because it raises an
        error if they have been changed in-place. With `return_slots` also slots [..., K], uint8. If several slots attain the maximum,
        the lowest is returned: always if their vectors are equal, and otherwise if their scores are equal after rounding.
        Slots take memory, one byte per logit, only if they are returned or a gradient can be asked for: under
        `torch.no_grad()`, and where no tensor requires a gradient, they are not written. A graph that is exported under
        `torch.no_grad()` writes none either, and has no gradient.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or, where a number is expected, not a number.
        ValueError: a shape, a device, a number or the name of the backend is wrong; the message names the argument.
        gistops.BackendUnavailable: the requested backend cannot be used here.
        NotImplementedError: a second derivative of a fused backend, or a fused backend that is requested by name inside a
            transform of `torch.func` other than `vmap`.
    """
    classifier = check_constellation(input, centers, displacements, tau, transform, axis, mlp)
    return checked_logits(input, classifier, backend, return_slots, logits_dtype)


def subcenter_logits(
    input: Tensor,
    centers: Tensor,
    tau: Tensor | float,
    *,
    return_slots: bool = False,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the logits of classes that have several centers each: `τ · max_j cos(f_i, w_kj)`.

    Sub-center ArcFace (Deng, Guo, Liu, Gong, Zafeiriou, ECCV 2020), and any method that computes M vectors per class. If
    the vectors are a center plus shared displacements, use `constellation_logits`, which is several times faster. Dtypes,
    zero vectors, ties, determinism and errors are as there.

    Args:
        input: features f, [..., d]; not normalized.
        centers: M sub-centers w per class, [K, M, d] with 1 <= M <= 256; not normalized.
        tau: temperature τ > 0, a tensor of one element or a number.
        return_slots: also return the sub-center of each logit.
        logits_dtype: as in `constellation_logits`.
        backend: as in `constellation_logits`.

    Returns:
        Logits [..., K], and with `return_slots` slots [..., K], as in `constellation_logits`.

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as in `constellation_logits`.
    """
    classifier = check_subcenters(input, centers, tau)
    return checked_logits(input, classifier, backend, return_slots, logits_dtype)


def checked_logits(
    input: Tensor,
    classifier: Classifier,
    backend: str | None,
    return_slots: bool,
    logits_dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the logits, with `return_slots` also the slots, of arguments that are checked except for `logits_dtype`."""
    dtype = check_logits_dtype(logits_dtype, input, classifier)
    need_slots = return_slots or _gradient_possible(input, classifier)
    logits, slots = _logits_of_rows(rows(input), classifier, backend, need_slots, dtype)
    return (restore(logits, input), restore(slots, input)) if return_slots else restore(logits, input)


def _gradient_possible(input: Tensor, classifier: Classifier) -> bool:
    """Return True if a gradient of the logits can be asked for. Wrappers of `torch.vmap` hide that a tensor requires one."""
    if not torch.is_grad_enabled():
        return False
    if transforms_active():
        return True
    tensors = (input, *classifier[:3], classifier.axis, *(classifier.mlp or ()))
    return any(x is not None and x.requires_grad for x in tensors)


def _logits_of_rows(
    input: Tensor,
    classifier: Classifier,
    backend: str | None,
    need_slots: bool,
    logits_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return logits [B, K], and slots [B, K], or empty slots without `need_slots`."""
    chosen = backends.choose(input.device.type, backend)
    if chosen == "reference":
        logits, slots = reference.logits(input, classifier)
        return logits.to(logits_dtype or logits.dtype), slots
    ops, options = backends.ops(chosen), (backends.allow_tf32(chosen), need_slots, logits_dtype)
    centers, displacements, tau = classifier[:3]
    if classifier.transform == "translation":
        outputs = ops.logits_forward.default(input, centers, displacements, tau, *options)
    elif classifier.transform == "subcenters":
        outputs = ops.subcenter_forward.default(input, centers, tau, *options)
    elif classifier.transform == "rotation":
        input, centers, _, *turns = rotation.operands(input, classifier, chosen)
        outputs = ops.rotation_forward.default(input, centers, tau, *turns, *options)
    else:
        outputs = mlp_transform.logits(ops, input, classifier, *options)
    return outputs[0], outputs[1]


def center_norms(classifier: Classifier) -> Tensor:
    """Return the norms [M, K] of frozen centers on the CPU, for `frozen_logits` and for top-k."""
    centers, displacements = classifier.centers.detach(), classifier.displacements.detach()
    norms: Tensor = torch.ops.gistops.center_norms.default(centers, displacements)
    return norms


def frozen_logits(
    input: Tensor,
    classifier: Classifier,
    norms: Tensor,
    return_slots: bool,
    logits_dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return logits, and slots, by the `cpu` backend from `center_norms`: the same bits, but not differentiable."""
    # A derivative in forward mode would be zero, and ONNX does not have the op.
    if unsupported_transform() or backends.exporting_to_onnx():
        return checked_logits(input, classifier, None, return_slots, logits_dtype)
    dtype = check_logits_dtype(logits_dtype, input, classifier)
    tensors = (t.detach() for t in classifier[:3])
    operator = torch.ops.gistops.frozen_logits.default
    logits, slots = operator(rows(input), *tensors, norms, return_slots, dtype)
    return (restore(logits, input), restore(slots, input)) if return_slots else restore(logits, input)
