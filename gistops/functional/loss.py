"""Cross-entropy, without logits [B, K]."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._checks import (
    check_class_vector,
    check_constellation,
    check_loss,
    check_some_classes,
    check_subcenters,
    check_transform,
    on_device,
)
from ..backends import reference
from ..operators.cross_entropy import cross_entropy, families
from ..operators.loss import ParkedLse, parks
from ..operators.registry import compute_dtype
from . import mlp as networks
from . import rotation
from .fused import allow_tf32, family, no_displacements
from .logits import Transform

MarginKind = Literal["logit", "cosine", "angle"]


def constellation_cross_entropy(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor | float,
    target: Tensor,
    *,
    transform: Transform = "translation",
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
    class_bias: Tensor | None = None,
    weight: Tensor | None = None,
    margin: Tensor | float | None = None,
    margin_kind: MarginKind = "logit",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `constellation_logits`, which are never held: names and meaning of `F.cross_entropy`.

    A step's memory beyond the gradients does not grow with B·K, but for translations on GPUs, where scores are held from
    the forward to the backward as long as they take less than 2 GiB. On the CPU it takes the three matrix products of a
    linear layer, as long as B is below 0.8 d (the scores wait where the gradient of the centres will lie); otherwise,
    and on GPUs where scores are not held, four. The sums are exact: no probability is left out. Differentiable once, in
    input, centers, displacements, tau, axis, mlp, class_bias, and a margin given as a tensor.

    Args:
        input, centers, displacements, tau, transform, axis, mlp, backend: as in `constellation_logits`.
        target: classes, [B], int64 or int32, 0 to K - 1 or `ignore_index`.
        class_bias: added to the logits, [K], floating. With log class frequencies this is the balanced softmax (Ren et
            al., NeurIPS 2020), or logit adjustment (Menon et al., ICLR 2021).
        weight: weights of the classes, [K], floating, not negative; takes no gradient.
        margin: what makes the target's logit smaller, a number or one for each class, [K].
        margin_kind: "logit": logit - margin; "cosine": τ (cos θ - margin), CosFace (Wang et al., CVPR 2018), and LDAM (Cao
            et al., NeurIPS 2019) with margins of n_k^-1/4; "angle": τ cos(θ + margin), ArcFace (Deng et al., CVPR 2019),
            and where θ + margin exceeds π, τ (cos θ - margin sin margin), as in its authors' code.
        reduction: "mean" (weighted by `weight` of the targets, as in `F.cross_entropy`), "sum" or "none".
        ignore_index: rows with this target count for nothing; a mean over no other row is NaN.
        label_smoothing: 0 to 1, the share of the target distribution that is spread evenly over all classes.
        return_lse: also return the log-sum-exp of each row's logits, with bias and margin, [B]; differentiable.

    Returns:
        the loss, a scalar, or [B] with `reduction="none"`, in the dtype of the logits; with `return_lse` also lse [B].

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as `constellation_logits`; the message names the argument.
        IndexError: a target is out of range; the message names its position. On a GPU, where looking would make the
            host wait, and in a compiled graph, it is a RuntimeError instead: on a GPU that of a device-side assertion,
            which comes later, and does not know the position.
    """
    tau = check_constellation(input, centers, displacements, tau)
    check_transform(transform, axis, mlp, input)
    return _cross_entropy(
        input,
        centers,
        displacements,
        tau,
        target,
        class_bias,
        weight,
        margin,
        margin_kind,
        reduction,
        ignore_index,
        label_smoothing,
        return_lse,
        backend,
        axis,
        mlp,
    )


def subcenter_cross_entropy(
    input: Tensor,
    centers: Tensor,
    tau: Tensor | float,
    target: Tensor,
    *,
    class_bias: Tensor | None = None,
    weight: Tensor | None = None,
    margin: Tensor | float | None = None,
    margin_kind: MarginKind = "logit",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`constellation_cross_entropy` for the free centres [K, M, d] of `subcenter_logits`."""
    tau = check_subcenters(input, centers, tau)
    return _cross_entropy(
        input,
        centers,
        no_displacements(input),
        tau,
        target,
        class_bias,
        weight,
        margin,
        margin_kind,
        reduction,
        ignore_index,
        label_smoothing,
        return_lse,
        backend,
    )


def _cross_entropy(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    target: Tensor,
    class_bias: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | float | None,
    margin_kind: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    return_lse: bool,
    backend: str | None,
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    classes = check_some_classes(centers)
    target = check_loss(target, input, classes, margin_kind, reduction, ignore_index, label_smoothing)
    for name, value in (("class_bias", class_bias), ("weight", weight)):
        if value is not None:
            check_class_vector(name, value, classes, input)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: expected a tensor that needs no gradient; call .detach() first")
    if isinstance(margin, Tensor) and margin.dim() > 0:
        check_class_vector("margin", margin, classes, input)
    chosen = backends.choose(input.device.type, backend)
    plain = centers.dim() == 2 and axis is None and mlp is None
    if chosen == "reference":
        loss, lse = reference.cross_entropy(
            input,
            centers,
            displacements,
            tau,
            target,
            class_bias,
            weight,
            margin,
            margin_kind,
            reduction,
            ignore_index,
            label_smoothing,
            axis,
            mlp,
        )
    elif chosen in ("triton", "cuda") and plain and family(chosen) in families:
        loss, lse = _fused(
            chosen,
            input,
            centers,
            displacements,
            tau,
            target,
            class_bias,
            weight,
            margin,
            margin_kind,
            reduction,
            ignore_index,
            label_smoothing,
        )
    else:
        ignored = target == ignore_index
        row = torch.where(ignored, 0, target)
        smoothed = None
        if label_smoothing > 0:
            smoothed = input.new_ones(classes, dtype=torch.float32) if weight is None else weight
        others, logit, sums = _lse(
            chosen, input, centers, displacements, tau, axis, mlp, class_bias, target, smoothed, ignore_index
        )
        lowered = logit
        if margin is not None:
            if not isinstance(margin, Tensor):
                margin = on_device(margin, logit.dtype, logit.device)
            margin = margin.to(logit)
            own = margin[row] if margin.dim() > 0 else margin
            lowered = _lowered(logit, tau.to(logit.dtype).reshape(()), own, margin_kind)
        bias = None if class_bias is None else class_bias.to(logit.dtype)
        score = lowered if bias is None else lowered + bias[row]
        loss = -F.logsigmoid(score - others)  # log(1 + Σ e^z / e^score): exact however small
        lse = torch.where(ignored, others, score + loss)
        scale = None if weight is None else weight.to(logit.dtype)[row]
        if scale is not None:
            loss = scale * loss
        if smoothed is not None:
            share = smoothed.to(logit.dtype)
            total = sums + (lowered - logit if scale is None else scale * (lowered - logit))
            if bias is not None:
                total = total + (share * bias).sum()
            spread = lse * share.sum() - total
            loss = (1 - label_smoothing) * loss + label_smoothing / classes * spread
        loss = torch.where(ignored, 0, loss)
        if reduction == "sum":
            loss = loss.sum()
        elif reduction == "mean":
            counted = (~ignored).to(logit.dtype) if scale is None else torch.where(ignored, 0, scale)
            loss = loss.sum() / counted.sum()
    return (loss, lse) if return_lse else loss


def _fused(
    backend: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    target: Tensor,
    class_bias: Tensor | None,
    weight: Tensor | None,
    margin: Tensor | float | None,
    margin_kind: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss and lse by the operator that makes the whole loss."""
    if margin is not None and not isinstance(margin, Tensor):
        dtype = compute_dtype(input, centers, displacements)
        margin = on_device(margin, dtype, input.device)
    loss, lse, inside = cross_entropy(
        family(backend),
        input,
        centers,
        displacements,
        tau,
        target,
        class_bias,
        weight,
        margin,
        margin_kind,
        reduction,
        int(ignore_index),
        float(label_smoothing),
        allow_tf32(backend),
    )
    classes = centers.shape[0]
    torch._assert_async(inside, f"target: expected 0 to {classes - 1} or ignore_index {ignore_index}")
    return loss, lse


def _lse(
    backend: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    axis: Tensor | None,
    mlp: tuple[Tensor, Tensor] | None,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    both: tuple[Tensor | None, Tensor | None] = (None, None)
    if axis is not None:
        both = rotation.tables(input, centers, displacements, axis)
        displacements = no_displacements(input)
    arguments = (input, centers, displacements, tau, class_bias, *both, target, weight)
    if backend == "cpu" and mlp is None and parks(*arguments):
        made: tuple[Tensor, Tensor, Tensor] = ParkedLse.apply(*arguments, ignore_index)  # type: ignore[no-untyped-call]
        return made
    if target.device.type == "cuda":
        inside = (target == ignore_index) | ((target >= 0) & (target < centers.shape[0]))
        torch._assert_async(
            inside.all(), f"target: expected 0 to {centers.shape[0] - 1} or ignore_index {ignore_index}"
        )
    if mlp is not None:
        return networks.lse(
            backend, input, centers, displacements, tau, mlp, class_bias, target, weight, ignore_index
        )
    operator = getattr(torch.ops.gistops, f"{family(backend)}_lse_forward").default
    made = operator(*arguments, ignore_index, allow_tf32(backend))
    return made


def _lowered(logit: Tensor, tau: Tensor, margin: Tensor, kind: str) -> Tensor:
    """The target's logits [B] with their margins."""
    if kind == "logit":
        return logit - margin
    if kind == "cosine":
        return logit - tau * margin
    cosine = logit / tau
    sine = (1 - cosine * cosine).clamp(min=torch.finfo(logit.dtype).tiny).sqrt()
    turned = cosine * margin.cos() - sine * margin.sin()
    beyond = cosine < (math.pi - margin).cos()
    return tau * torch.where(beyond, cosine - margin * margin.sin(), turned)
