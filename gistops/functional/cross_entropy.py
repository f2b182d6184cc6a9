"""The cross-entropy without logits [B, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._checks import check_classifier, check_loss
from .._classifier import Classifier, LossOptions, MarginKind, Transform, no_displacements
from .._dtensor import is_dtensor
from .._numbers import plain_scalar
from ..backends import eager_loss, reference
from ..backends.in_place import detect_changes
from . import stashed_loss
from .leading import restore, rows
from .row_loss import (
    assert_in_range,
    assert_targets,
    copied_arguments,
    in_compute_dtype,
    loss_from_terms,
    row_terms,
)
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
    sample_negatives: float | None = None,
    generator: torch.Generator | None = None,
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
    kept in the buffer of the centers' gradient, which has room for them if B is below about 0.8 d. NVIDIA GPUs keep them
    there too, for translations in half precision with 33,792 classes or more, if B is at most d / 2 and m at most 7.

    Args:
        input, centers, displacements, tau, transform, axis, mlp, backend: as in `constellation_logits`.
        target: classes, [...], int64 or int32, from 0 to K - 1, or `ignore_index`.
        class_bias: added to the logits, [K], floating-point. Log class frequencies give the balanced softmax (Ren et al.,
            NeurIPS 2020), or logit adjustment (Menon et al., ICLR 2021). Minus infinity excludes a class. Plus infinity
            makes loss and lse NaN.
        weight: class weights, [K], floating-point, not negative, and with label smoothing finite; not differentiable.
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
        sample_negatives: share of the classes that the loss uses, above 0, up to 1: all targets of the batch and other classes,
            drawn uniformly by each call (Partial FC: An et al., ICCV Workshops 2021). With sharded centers, each process draws this
            share of its classes. The loss is that over the drawn classes, as if there were no others: it is too low, and its gradient
            is not an unbiased estimate (Rawat et al., NeurIPS 2019). The gradient of centers is a sparse tensor of the drawn rows,
            for `gistops.optim.RowOptimizer`; it is dense if centers are computed, as by a parametrization, and inside `torch.func`.
            A sparse gradient breaks the graph of torch.compile, which torch 2.11 cannot resume. Excludes label_smoothing.
        generator: draws the classes, on the device of input; None for the device's default generator.
        return_lse: also return the log-sum-exp of each row's logits, including bias and margin; differentiable.

    Returns:
        The loss in the dtype of the logits: a scalar, or [...] with `reduction="none"`. With `return_lse` also lse, [...].

    Raises:
        TypeError, ValueError, gistops.BackendUnavailable: as in `constellation_logits`; the message names the argument.
            Negative weights and angular margins beyond 0 to π are checked as tau is: numbers everywhere, tensors
            on the CPU in eager mode alone.
        IndexError: a target is out of range; the message names its position. In a compiled graph, and on a GPU, where
            the check must not make the host wait, a RuntimeError is raised instead. On a GPU, it comes from a device-side
            assertion: later, and without the position.
    """
    # A graph ends here, where no NamedTuple is alive: torch 2.11 cannot resume with one.
    ignore_index, label_smoothing = plain_scalar(ignore_index), plain_scalar(label_smoothing)
    options = LossOptions(
        *(class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing),
        *(sample_negatives, generator),
    )
    classifier = Classifier(centers, displacements, tau, transform, axis, mlp)  # type: ignore[arg-type]
    return _cross_entropy(input, classifier, target, options, return_lse, backend)


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
    sample_negatives: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross-entropy of `subcenter_logits` without materializing the logits.

    Arguments, returns, errors and memory are those of `constellation_cross_entropy`, with centers [K, M, d]. On GPUs, the
    products of the sub-centers exist for one chunk of classes at a time.
    """
    ignore_index, label_smoothing = plain_scalar(ignore_index), plain_scalar(label_smoothing)
    options = LossOptions(
        *(class_bias, weight, margin, margin_kind, reduction, ignore_index, label_smoothing),
        *(sample_negatives, generator),
    )
    classifier = Classifier(centers, None, tau, "subcenters")  # type: ignore[arg-type]  # the check adds displacements
    return _cross_entropy(input, classifier, target, options, return_lse, backend)


def _cross_entropy(
    input: Tensor,
    classifier: Classifier,
    target: Tensor,
    options: LossOptions,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss and, with `return_lse`, the log-sum-exp [...]; the arguments are unchecked."""
    if is_dtensor(classifier.centers):
        from .sharded.loss import cross_entropy  # imports torch.distributed.tensor, which few processes need

        return cross_entropy(input, classifier, target, options, return_lse, backend)  # type: ignore[no-any-return]
    classifier = check_classifier(input, classifier)
    target, options = check_loss(input, classifier, target, options)
    target = target if target.dim() == 1 else target.reshape(-1)
    if options.sample_negatives is not None:
        from .sampled_classes import IGNORED, sampled

        if target.device.type == "cuda" or torch.compiler.is_compiling():  # otherwise `check_loss` has raised
            assert_targets(target.long(), classifier.centers.shape[0], options.ignore_index)
        labels = torch.where(target == options.ignore_index, IGNORED, target.long())
        classifier, target, options = sampled(classifier.centers, classifier, labels, options)
    loss, lse = loss_of_rows(rows(input), classifier, target, options, backend)
    loss = restore(loss, input) if options.reduction == "none" else loss
    if not return_lse:
        return loss
    lse = restore(lse, input)
    # A copy if it has a gradient: the backward may need lse, which the caller may change in-place.
    return loss, lse.clone() if lse.requires_grad else lse


def loss_of_rows(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B] of rows [B, d]."""
    chosen = backends.choose(input.device.type, backend)
    if chosen in ("reference", "plain"):
        return reference.cross_entropy(input, classifier, target, options)
    if classifier.transform in eager_loss.WHOLE_LOSS.get(chosen, ()):
        coeffs: tuple[Tensor | None, Tensor | None] = (None, None)
        if classifier.transform == "rotation":
            watched = (classifier.displacements, classifier.axis)
            input, centers, x, y = rotation.coefficients(input, classifier)
            classifier = classifier._replace(centers=centers, displacements=no_displacements(input))
            coeffs = (
                detect_changes(x, *watched),
                detect_changes(y, *watched),
            )  # the op saves no more than these
        ops, allow_tf32 = backends.ops(chosen), backends.allow_tf32(chosen)
        loss, lse, in_range = eager_loss.cross_entropy(
            ops, input, classifier, coeffs, target, options, allow_tf32
        )
        assert_in_range(in_range, classifier.centers.shape[0], options.ignore_index)
        return loss, lse
    if stashed_loss.serves(chosen, input, classifier, target, options):
        return stashed_loss.stashed_loss(input, classifier, target, options)
    return _loss_from_parts(chosen, input, classifier, target, options)


def _loss_from_parts(
    backend: str, input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp [B]; the op sums over the classes, and autograd covers everything else here."""
    copied = copied_arguments(input, classifier, target, options)
    classifier, options = in_compute_dtype(input, classifier, options)
    terms = row_terms(backend, input, classifier, target, options)
    terms = terms._replace(lse_others=detect_changes(terms.lse_others, *copied))
    ignored = target.long() == options.ignore_index
    return loss_from_terms(terms, classifier.tau, ignored, classifier.centers.shape[0], options)
