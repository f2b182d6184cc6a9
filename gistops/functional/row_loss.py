"""The loss of each row from sums over the classes: on the CPU, for MLPs, and for smoothed losses of sharded classes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._checks import on_device
from .._classifier import Classifier, LossOptions, MarginKind
from .._functorch import all_samples, transforms_active
from ..backends import reference
from ..backends.cpu_stash import StashedCrossEntropyParts, can_stash, in_autocast_dtype
from ..operators.registry import nonzero_tau
from .transforms import mlp as mlp_transform
from .transforms import rotation


class RowTerms(NamedTuple):
    """The sums over classes, and the values of the targets, that make a loss; [B] in the dtype of the logits unless noted.

    Of rows whose target is ignored, all but `lse_others`, `sums`, `weight` and `margin` are not used; the last two are 0.
    """

    lse_others: Tensor  # log-sum-exp of all classes but the target, with biases
    logit: Tensor  # of the target, without margin and bias
    bias: Tensor | None  # of the target
    weight: Tensor | None  # of the target
    margin: Tensor | float | None  # of the target; a number or a scalar if all classes have one
    sums: Tensor | None  # Σ_k weight_k z_k, without margin and bias; None without smoothing
    total_weight: Tensor | None  # Σ_k weight_k, a scalar
    weighted_bias: Tensor | None  # Σ_k weight_k bias_k, a scalar


def row_terms(
    backend: str, input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> RowTerms:
    """Return the terms of rows [B, d]; classifier and options have tau and class_bias in the dtype of the logits."""
    dtype, bias = classifier.compute_dtype(input), options.class_bias
    labels = target.long()  # the ops take target itself, so that a later in-place change of it is detected
    ignored = labels == options.ignore_index
    row = torch.where(ignored, 0, labels)  # a class whose weight or margin may be infinite or NaN
    shares = None  # class weights of the smoothed part
    if options.label_smoothing > 0:
        weight = options.weight
        classes = classifier.centers.shape[0]
        shares = input.new_ones(classes, dtype=torch.float32) if weight is None else weight
    lse_others, logit, sums = _parts(backend, input, classifier, target, options, shares)
    margin = options.margin
    if isinstance(margin, Tensor):
        margin = margin.to(logit)
        margin = torch.where(ignored, 0, margin[row]) if margin.dim() > 0 else margin
    total_weight = weighted_bias = None
    if shares is not None:
        shares = shares.to(dtype)
        total_weight = shares.sum()
        weighted_bias = None if bias is None else (shares * bias).sum()
    return RowTerms(
        lse_others,
        logit,
        None if bias is None else bias[row],
        None if options.weight is None else torch.where(ignored, 0, options.weight.to(dtype)[row]),
        margin,
        None if shares is None else sums,
        total_weight,
        weighted_bias,
    )


def in_compute_dtype(
    input: Tensor, classifier: Classifier, options: LossOptions
) -> tuple[Classifier, LossOptions]:
    """Return tau and class_bias in the dtype of the logits.

    The op and the loss of a row both use them. Converted once, their gradients are rounded once.
    """
    dtype = classifier.compute_dtype(input)
    bias = None if options.class_bias is None else options.class_bias.to(dtype)
    return classifier._replace(tau=classifier.tau.to(dtype)), options._replace(class_bias=bias)


def loss_from_terms(
    terms: RowTerms, tau: Tensor, ignored: Tensor, classes: int, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B].

    No large number is added and taken off again, so that a bias or a margin of 1e9 or minus infinity costs no digit.

    Args:
        terms: the terms of the rows.
        tau: in the dtype of the logits.
        ignored: True for rows that do not count, [B].
        classes: the number of classes K.
        options: their vectors are not used.
    """
    lse_others, logit, scale = terms.lse_others, terms.logit, terms.weight
    lowered = logit
    if terms.margin is not None:
        lowered = _apply_margin(logit, tau.reshape(()), terms.margin, options.margin_kind)
    score = lowered
    if terms.bias is not None:
        score = lowered + terms.bias
    if terms.bias is not None or terms.margin is not None:
        score = torch.where(score == torch.inf, torch.nan, score)  # as in F.cross_entropy
    loss = -F.logsigmoid(score - lse_others)  # log(1 + Σ e^z / e^score): accurate for tiny losses
    lse = torch.where(ignored, lse_others, torch.logaddexp(lse_others, score))
    spread = None if terms.sums is None else _smoothed_loss(lse, loss, lowered, terms)
    return reduced_loss(loss, spread, scale, ignored, classes, options), lse


def reduced_loss(
    loss: Tensor,
    spread: Tensor | None,
    scale: Tensor | None,
    ignored: Tensor,
    classes: int,
    options: LossOptions,
) -> Tensor:
    """Return the weighted, smoothed and reduced loss.

    Args:
        loss: the loss of each row, without a class weight, [B].
        spread: Σ_k weight_k (lse - score_k), [B]; None without smoothing.
        scale: the target's class weight, [B], 0 if it is ignored; None: 1.
        ignored, classes, options: as in `loss_from_terms`.
    """
    smoothing = options.label_smoothing
    if scale is not None:
        loss = scale * loss
    if spread is not None:
        loss = (1 - smoothing) * loss + smoothing / classes * spread
    loss = torch.where(ignored, 0, loss)
    if options.reduction == "sum":
        loss = loss.sum()
    elif options.reduction == "mean":
        total = (~ignored if scale is None else scale).sum(dtype=loss.dtype)
        if scale is not None and smoothing > 0:  # otherwise the sum of the losses is 0 too
            total = torch.where(total == 0, torch.nan, total)
        loss = loss.sum() / total
    return loss


def copied_arguments(
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


def _smoothed_loss(lse: Tensor, loss: Tensor, lowered: Tensor, terms: RowTerms) -> Tensor:
    """Return Σ_k weight_k (lse - score_k), [B].

    Args:
        lse: the log-sum-exp of all classes.
        loss: lse minus the target's score, without a class weight.
        lowered: the target's logit after its margin, without bias.
        terms: the terms of the rows.
    """
    sums, total_weight, scale = terms.sums, terms.total_weight, terms.weight
    assert sums is not None
    assert total_weight is not None
    target_term = loss
    if terms.bias is not None and terms.weighted_bias is not None:
        # The target's bias is in the sum over all biases too. Of an infinite bias, only the latter may remain.
        target_term = torch.where(terms.bias == -torch.inf, lse - lowered, loss + terms.bias)
        sums = sums + terms.weighted_bias
    target_term = terms.logit + target_term
    if scale is None:
        return lse * (total_weight - 1) - sums + target_term
    return lse * (total_weight - scale) - sums + scale * target_term


def _parts(
    backend: str,
    input: Tensor,
    classifier: Classifier,
    target: Tensor,
    options: LossOptions,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of `cross_entropy_parts_forward`."""
    if backend == "reference":
        return reference.cross_entropy_parts(
            input, classifier, options.class_bias, target, weight, options.ignore_index
        )
    tau, class_bias, ignore_index = classifier.tau, options.class_bias, options.ignore_index
    input, centers, displacements, *turns = rotation.operands(input, classifier, backend)
    arguments: tuple[Any, ...] = (input, centers, displacements, tau, class_bias, *turns, target, weight)
    if backend == "cpu" and classifier.mlp is None and can_stash(centers, *arguments):
        parts: tuple[Tensor, Tensor, Tensor]
        arguments = (*in_autocast_dtype(*arguments[:3]), *arguments[3:])
        parts = StashedCrossEntropyParts.apply(*arguments, ignore_index)  # type: ignore[no-untyped-call]
        return parts
    if target.device.type == "cuda":
        assert_targets(target.long(), centers.shape[0], ignore_index)
    ops, allow_tf32 = backends.ops(backend), backends.allow_tf32(backend)
    if classifier.mlp is not None:
        return mlp_transform.cross_entropy_parts(
            ops, input, classifier, class_bias, target.long(), weight, ignore_index, allow_tf32
        )
    parts = ops.cross_entropy_parts_forward.default(*arguments, ignore_index, allow_tf32)
    return parts


def assert_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Assert on the device that all targets are classes or ignored."""
    in_range = (target == ignore_index) | ((target >= 0) & (target < classes))
    assert_in_range(in_range.all(), classes, ignore_index)


def assert_in_range(in_range: Tensor, classes: int, ignore_index: int | str) -> None:
    """Assert on the device that a flag is True."""
    last: int | str = classes - 1
    if torch.compiler.is_compiling():  # a number in the text would make each of its values a graph of its own
        last, ignore_index = "K - 1", ""
    if transforms_active() and not torch.compiler.is_compiling():  # a graph cannot hold the unwrapped tensor
        in_range = all_samples(in_range).all()
    torch._assert_async(in_range, f"target: expected 0 to {last} or ignore_index {ignore_index}".strip())


def _apply_margin(logit: Tensor, tau: Tensor, margin: Tensor | float, kind: MarginKind) -> Tensor:
    """Lower the targets' logits [B] by their margins: one for each row, or one for all."""
    if not isinstance(margin, Tensor):
        margin = on_device(margin, logit.dtype, logit.device)
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
