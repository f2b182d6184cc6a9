"""The cross-entropy without logits [B, K]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._checks import check_constellation, check_loss, check_subcenters, on_device, plain_scalar
from .._classifier import Classifier, LossOptions, MarginKind, Transform, no_displacements
from .._functorch import all_samples, transforms_active
from ..backends import eager_loss, reference
from ..backends.cpu_stash import StashedCrossEntropyParts, can_stash
from ..backends.in_place import detect_changes
from ..operators.registry import nonzero_tau
from .leading import restore, rows
from .transforms import mlp as mlp_transform
from .transforms import rotation


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
    """Return the cross-entropy of `constellation_logits` without materializing the logits.

    Names and meanings are those of `F.cross_entropy`. Losses are exact: no probability is approximated. Huge and infinite
    biases and margins give what `F.cross_entropy` gives for such logits: NaN where a weight of 0 meets an infinite
    loss. Differentiable once in input, centers, displacements, tau, axis, mlp, class_bias, and a margin given as a tensor.

    Beyond the gradients, the memory of a training step does not grow with B·K, with one exception: on GPUs, except with
    `mlp`, scores are kept from the forward to the backward if they take at most 2 GiB. A step takes three matrix products,
    as a linear layer does, if the scores are kept. It takes four if the backward recomputes them. On the CPU, scores are
    kept in the buffer of the centers' gradient, where there is room for them while B is below about 0.8 d; on NVIDIA GPUs
    in half precision those of translations with 33,792 classes or more too, while B is at most d / 2 and M at most 8.

    Args:
        input, centers, displacements, tau, transform, axis, mlp, backend: as in `constellation_logits`.
        target: classes, [...], int64 or int32, from 0 to K - 1, or `ignore_index`.
        class_bias: added to the logits, [K], floating-point. Log class frequencies give the balanced softmax (Ren et al.,
            NeurIPS 2020), or logit adjustment (Menon et al., ICLR 2021). Minus infinity excludes a class. Plus infinity
            makes loss and lse NaN.
        weight: class weights, [K], floating-point, not negative; not differentiable.
        margin: lowers the target's logit; a finite number, or a floating-point tensor without dimensions or with one
            element per class, [K].
        margin_kind: "logit": logit - margin. "cosine": τ (cos θ - margin), as in CosFace (Wang et al., CVPR 2018), and in
            LDAM (Cao et al., NeurIPS 2019) with margins proportional to n_k^-1/4. "angle": τ cos(θ + margin), as in ArcFace
            (Deng et al., CVPR 2019), for margins from 0 to π; where θ + margin exceeds π, τ (cos θ - margin sin margin),
            as in the authors' code.
        reduction: "mean" (weighted by the targets' `weight`, as in `F.cross_entropy`; NaN if these weights are all 0), "sum"
            or "none".
        ignore_index: rows with this target do not count. If no row counts, the mean is NaN.
        label_smoothing: share of the target distribution that is spread evenly over all classes, from 0 to 1. On GPUs,
            torch.compile makes a graph for each value.
        return_lse: also return the log-sum-exp of each row's logits, including bias and margin; differentiable.

    Returns:
        The loss in the dtype of the logits: a scalar, or [...] with `reduction="none"`. With `return_lse` also lse, [...].

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as in `constellation_logits`; the message names the argument.
            Negative weights and angular margins beyond 0 to π are found as a tau of 0 is: for numbers everywhere, for
            tensors on the CPU in eager mode.
        IndexError: a target is out of range; the message names its position. In a compiled graph, and on a GPU, where
            the check must not make the host wait, a RuntimeError is raised instead. On a GPU, it comes from a device-side
            assertion: later, and without the position.
    """
    # A graph ends here, where no NamedTuple is alive: torch 2.11 cannot resume with one.
    ignore_index, label_smoothing = plain_scalar(ignore_index), plain_scalar(label_smoothing)
    classifier = check_constellation(input, centers, displacements, tau, transform, axis, mlp)
    options = LossOptions(class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing)
    loss, lse = _cross_entropy(input, classifier, target, options, backend)
    return (loss, _owned(lse)) if return_lse else loss


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
    """Return the cross-entropy of `subcenter_logits` without materializing the logits.

    Arguments, returns and errors are those of `constellation_cross_entropy`, with centers [K, M, d]. So is the memory: on
    GPUs, the products of the sub-centers exist for one chunk of classes at a time.
    """
    ignore_index, label_smoothing = plain_scalar(ignore_index), plain_scalar(label_smoothing)
    options = LossOptions(class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing)
    loss, lse = _cross_entropy(input, check_subcenters(input, centers, tau), target, options, backend)
    return (loss, _owned(lse)) if return_lse else loss


def _owned(lse: Tensor) -> Tensor:
    """Return a copy of a log-sum-exp that has a gradient: the backward may need lse, which the caller may change in-place."""
    return lse.clone() if lse.requires_grad else lse


def _cross_entropy(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [...]."""
    target, options = check_loss(input, classifier, target, options)
    target = target if target.dim() == 1 else target.reshape(-1)
    loss, lse = _loss_of_rows(rows(input), classifier, target, options, backend)
    return restore(loss, input) if options.reduction == "none" else loss, restore(lse, input)


def _loss_of_rows(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B] of rows [B, d]."""
    chosen = backends.choose(input.device.type, backend)
    if chosen in ("reference", "plain"):
        return reference.cross_entropy(input, classifier, target, options)
    if classifier.transform in eager_loss.WHOLE_LOSS.get(chosen, ()):
        watched = (classifier.displacements, classifier.axis)
        input, classifier, coeffs = _operands(input, classifier, widen=False)
        if coeffs[0] is not None and coeffs[1] is not None:  # the op saves no more than these
            coeffs = detect_changes(coeffs[0], *watched), detect_changes(coeffs[1], *watched)
        ops, allow_tf32 = backends.ops(chosen), backends.allow_tf32(chosen)
        loss, lse, in_range = eager_loss.cross_entropy(
            ops, input, classifier, coeffs, target, options, allow_tf32
        )
        _assert_in_range(in_range, classifier, options)
        return loss, lse
    return _loss_from_parts(chosen, input, classifier, target, options)


def _loss_from_parts(
    backend: str, input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B]; the op sums over the classes, and autograd covers everything else here.

    No large number is added and taken off again, so that a bias or a margin of 1e9 or minus infinity costs no digit.
    """
    classes, smoothing = classifier.centers.shape[0], options.label_smoothing
    copied = _copied(input, classifier, target, options)
    # The op and the lines below both use tau and class_bias. Converted once here, their gradients are rounded once.
    dtype = classifier.compute_dtype(input)
    classifier = classifier._replace(tau=classifier.tau.to(dtype))
    bias = None if options.class_bias is None else options.class_bias.to(dtype)
    options = options._replace(class_bias=bias)
    labels = target.long()  # the ops take target itself, so that a later in-place change of it is detected
    ignored = labels == options.ignore_index
    row = torch.where(ignored, 0, labels)
    shares = None  # class weights of the smoothed part
    if smoothing > 0:
        weight = options.weight
        shares = input.new_ones(classes, dtype=torch.float32) if weight is None else weight
    lse_others, logit, sums = _parts(backend, input, classifier, target, options, shares)
    lse_others = detect_changes(lse_others, *copied)
    lowered = logit
    if options.margin is not None:
        lowered = _apply_margin(logit, classifier.tau.reshape(()), options.margin, options.margin_kind, row)
    score, row_bias = lowered, None
    if bias is not None:
        row_bias = bias[row]
        score = lowered + row_bias
        score = torch.where(score == torch.inf, torch.nan, score)  # as in F.cross_entropy
    loss = -F.logsigmoid(score - lse_others)  # log(1 + Σ e^z / e^score): accurate for tiny losses
    lse = torch.where(ignored, lse_others, torch.logaddexp(lse_others, score))
    scale = None if options.weight is None else options.weight.to(dtype)[row]
    spread = None
    if shares is not None:
        spread = _smoothed_loss(lse, loss, logit, lowered, sums, shares.to(dtype), scale, bias, row_bias)
    if scale is not None:
        loss = scale * loss
    if spread is not None:
        loss = (1 - smoothing) * loss + smoothing / classes * spread
    loss = torch.where(ignored, 0, loss)
    if options.reduction == "sum":
        loss = loss.sum()
    elif options.reduction == "mean":
        counted = (~ignored).to(dtype) if scale is None else torch.where(ignored, 0, scale)
        total = counted.sum()
        if scale is not None and smoothing > 0:  # otherwise the sum of the losses is 0 too
            total = torch.where(total == 0, torch.nan, total)
        loss = loss.sum() / total
    return loss, lse


def _copied(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> list[Tensor | float | None]:
    """Return those arguments of which the ops save no more than a copy; they save translations and sub-centers themselves."""
    _, displacements, tau, transform, axis, mlp = classifier
    dtype = classifier.compute_dtype(input)
    copied = [x for x in (tau, options.class_bias) if x is not None and x.dtype != dtype]
    if transform in ("rotation", "mlp"):
        copied += [
            displacements,
            tau,
            target,
            *(x for x in (axis, options.class_bias, *(mlp or ())) if x is not None),
        ]
    return [options.weight, options.margin, *copied]


def _smoothed_loss(
    lse: Tensor,
    loss: Tensor,
    logit: Tensor,
    lowered: Tensor,
    sums: Tensor,
    shares: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    row_bias: Tensor | None,
) -> Tensor:
    """Return Σ_k weight_k (lse - score_k), [B].

    Args:
        loss: lse minus the target's score, without a class weight.
        logit, lowered: the target's logit before and after its margin, without bias.
        sums: Σ_k weight_k z_k, without margin and bias.
        shares: class weights, [K].
        scale: the target's class weight; None: 1.
        bias, row_bias: the biases [K], and those of the targets [B].
    """
    target_term = loss
    if bias is not None and row_bias is not None:
        # The target's bias is in the sum over all biases too. Of an infinite bias, only the latter may remain.
        target_term = torch.where(row_bias == -torch.inf, lse - lowered, loss + row_bias)
        sums = sums + (shares * bias).sum()
    target_term = logit + target_term
    if scale is None:
        return lse * (shares.sum() - 1) - sums + target_term
    return lse * (shares.sum() - scale) - sums + scale * target_term


def _operands(
    input: Tensor, classifier: Classifier, widen: bool = True
) -> tuple[Tensor, Classifier, tuple[Tensor | None, Tensor | None]]:
    """Return the operands of the ops: input, the classifier, and the coefficients of rotations instead of displacements.

    widen: as in `rotation.operands`.
    """
    if classifier.transform != "rotation":
        return input, classifier, (None, None)
    input, centers, *coeffs = rotation.operands(input, classifier, widen)
    classifier = classifier._replace(centers=centers, displacements=no_displacements(input))
    return input, classifier, (coeffs[0], coeffs[1])


def _parts(
    backend: str,
    input: Tensor,
    classifier: Classifier,
    target: Tensor,
    options: LossOptions,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of `cross_entropy_parts_forward`."""
    input, classifier, coeffs = _operands(input, classifier)
    centers, displacements, tau = classifier[:3]
    class_bias, ignore_index = options.class_bias, options.ignore_index
    arguments = (input, centers, displacements, tau, class_bias, *coeffs, target, weight)
    if backend == "cpu" and classifier.mlp is None and can_stash(centers, *arguments):
        parts: tuple[Tensor, Tensor, Tensor]
        parts = StashedCrossEntropyParts.apply(*arguments, ignore_index)  # type: ignore[no-untyped-call]
        return parts
    if target.device.type == "cuda":
        in_range = (target.long() == ignore_index) | ((target >= 0) & (target < centers.shape[0]))
        _assert_in_range(in_range.all(), classifier, options)
    ops, allow_tf32 = backends.ops(backend), backends.allow_tf32(backend)
    if classifier.mlp is not None:
        return mlp_transform.cross_entropy_parts(
            ops, input, classifier, class_bias, target.long(), weight, ignore_index, allow_tf32
        )
    parts = ops.cross_entropy_parts_forward.default(*arguments, ignore_index, allow_tf32)
    return parts


def _assert_in_range(in_range: Tensor, classifier: Classifier, options: LossOptions) -> None:
    last: int | str = classifier.centers.shape[0] - 1
    ignore_index: int | str = options.ignore_index
    if torch.compiler.is_compiling():  # a number in the text would make each of its values a graph of its own
        last, ignore_index = "K - 1", ""
    if transforms_active() and not torch.compiler.is_compiling():  # a graph cannot hold the unwrapped tensor
        in_range = all_samples(in_range).all()
    torch._assert_async(in_range, f"target: expected 0 to {last} or ignore_index {ignore_index}".strip())


def _apply_margin(
    logit: Tensor, tau: Tensor, margin: Tensor | float, kind: MarginKind, row: Tensor
) -> Tensor:
    """Lower the targets' logits [B] by their margins; row: the target of each row, [B]."""
    if not isinstance(margin, Tensor):
        margin = on_device(margin, logit.dtype, logit.device)
    margin = margin.to(logit)
    margin = margin[row] if margin.dim() > 0 else margin
    if kind == "logit":
        return logit - margin
    if kind == "cosine":
        return logit - tau * margin
    tau = nonzero_tau(tau)
    cosine = logit / tau
    sine = (1 - cosine * cosine).clamp(min=torch.finfo(logit.dtype).tiny).sqrt()
    rotated = cosine * margin.cos() - sine * margin.sin()
    beyond = (margin > math.pi) | ((margin >= 0) & (cosine < -margin.cos()))  # θ + margin exceeds π
    return tau * torch.where(beyond, cosine - margin * margin.sin(), rotated)
