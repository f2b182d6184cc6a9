"""The cross-entropy over sharded classes, without logits [B, K] anywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._checks import check_loss
from ..._classifier import Classifier, LossOptions
from ..._dtensor import is_dtensor
from ...backends import eager_loss
from ..cross_entropy import loss_of_rows
from ..row_loss import RowTerms, assert_targets, in_compute_dtype, loss_from_terms, reduced_loss, row_terms
from ..sampled_classes import IGNORED, sampled
from .collectives import gather_rows, join, leave, once
from .problem import agreed, enter_problem
from .shards import Shards


class _Options(NamedTuple):
    """The checked arguments of a loss beside those of the logits, of this process."""

    target: Tensor  # [B], int64, global classes
    options: LossOptions  # vectors of this process's classes
    replicated: tuple[Tensor, ...]  # a margin that is a scalar tensor
    sharded: tuple[Tensor, ...]  # vectors


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cross_entropy(
    input: Tensor,
    classifier: Classifier,
    target: Any,
    options: LossOptions,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss and, with `return_lse`, the log-sum-exp [...] over the classes of all processes.

    Arguments are those of the public functions, unchecked. Centers are a DTensor with placement Shard(0).
    """

    def check(shards: Shards, input: Tensor, classifier: Classifier) -> tuple[dict[str, object], _Options]:
        facts, checked = _checked_options(shards, input, classifier, target, options)
        return {**facts, "return_lse": return_lse}, checked

    centers = classifier.centers
    shards, batch, problem = agreed("cross-entropy", input, classifier, backend, check)
    more: _Options = problem.more
    x, classifier, margins = enter_problem(shards, batch, problem, more.replicated)
    labels = more.target if problem.replicated_input else gather_rows(shards, batch.sizes, more.target)
    options = more.options
    if margins:
        options = options._replace(margin=margins[0])
    loss, lse = _joint_loss(shards, problem.backend, x, centers, classifier, labels, options)
    outputs = (loss, lse) if return_lse else (loss,)
    loss, *rest = leave(shards, batch, problem.replicated_input, *outputs)
    loss = loss.reshape(problem.shape) if options.reduction == "none" else loss
    return (loss, rest[0].reshape(problem.shape)) if return_lse else loss


def _checked_options(
    shards: Shards, input: Tensor, classifier: Classifier, target: Any, options: LossOptions
) -> tuple[dict[str, object], _Options]:
    """Return the facts that all processes must have in common, and the options of this process's classes."""
    if is_dtensor(target):
        target = target.to_local()
    local = options._replace(
        class_bias=shards.local_part("class_bias", options.class_bias),
        weight=shards.local_part("weight", options.weight),
        margin=shards.local_part("margin", options.margin),
    )
    target, local = check_loss(input, classifier, target, local, shards.classes)
    facts: dict[str, object] = {
        name: _description(value) if isinstance(value, Tensor) else value
        for name, value in options._asdict().items()
        if name != "generator"
    }
    margin = local.margin
    is_scalar = isinstance(margin, Tensor) and margin.dim() == 0
    vectors = (local.class_bias, None if is_scalar else margin)
    return facts, _Options(
        target.reshape(-1).long(),
        local,
        (margin,) if is_scalar else (),  # type: ignore[arg-type]
        tuple(v for v in vectors if isinstance(v, Tensor)),
    )


def _description(value: Tensor) -> str:
    text = f"a tensor with {value.dim()} dimensions"
    return f"{text} that needs a gradient" if value.requires_grad and torch.is_grad_enabled() else text


def _joint_loss(
    shards: Shards,
    backend: str,
    x: Tensor,
    centers: Tensor,
    classifier: Classifier,
    labels: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp of the rows of all processes, [B]; the same in all processes.

    centers: the DTensor whose part the classifier has.
    """
    if labels.device.type == "cuda":  # on the CPU, `check_loss` has raised
        assert_targets(labels, shards.classes, options.ignore_index)
    ignored = labels == options.ignore_index
    owned = ~ignored & (labels >= shards.start) & (labels < shards.stop)
    target = torch.where(owned, labels - shards.start, IGNORED)
    local = options._replace(ignore_index=IGNORED)
    if options.sample_negatives is not None:
        classifier, target, local = sampled(centers, classifier, target, local)
    whole = classifier.transform in eager_loss.WHOLE_LOSS.get(backend, ())
    if whole and options.label_smoothing == 0:
        return _from_losses(shards, backend, x, classifier, target, owned, ignored, local)
    classifier, local = in_compute_dtype(x, classifier, local)
    if shards.start < shards.stop:
        terms = row_terms(backend, x, classifier, target, local)
    else:
        terms = _terms_without_classes(x, classifier, local)
    terms = _joined(shards, terms, owned)
    tau = once(shards, classifier.tau)
    if isinstance(terms.margin, Tensor) and terms.margin.dim() == 0:
        terms = terms._replace(margin=once(shards, terms.margin))
    return loss_from_terms(terms, tau, ignored, shards.classes, options)


def _joined(shards: Shards, terms: RowTerms, owned: Tensor) -> RowTerms:
    """Return the terms over the classes of all processes."""
    mine: dict[str, Tensor] = {}
    for name in ("logit", "bias", "weight", "margin"):  # of the target, which one process has
        value = getattr(terms, name)
        if isinstance(value, Tensor) and value.dim() > 0:
            mine[name] = torch.where(owned, value, 0)
    for name in ("sums", "total_weight", "weighted_bias"):
        if (value := getattr(terms, name)) is not None:
            mine[name] = value
    lse, totals = join(shards, terms.lse_others, list(mine.values()))
    return terms._replace(lse_others=lse, **dict(zip(mine, totals, strict=True)))


def _from_losses(
    shards: Shards,
    backend: str,
    x: Tensor,
    classifier: Classifier,
    target: Tensor,
    owned: Tensor,
    ignored: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return the joint loss from the losses over the classes of each process, as the kernels of GPUs compute them.

    With l and z the log-sum-exp and the score of the target over the classes of the process that has the target, and r the
    log-sum-exp over all other classes, the loss is log(e^l + e^r) - z = (l - z) + log(1 + e^(r - l)): no digit is lost.
    """
    scale = None
    if shards.start < shards.stop:
        loss, own, others = _losses_of_classes(backend, x, classifier, target, owned, options)
        if options.weight is not None:
            scale = options.weight.to(loss.dtype)[torch.where(owned, target, 0)]
    else:  # the collectives are those of the other processes
        terms = _terms_without_classes(x, classifier, options)
        loss, own, others, scale = terms.logit, terms.logit, terms.lse_others, terms.weight
    mine = [torch.where(owned, value, 0) for value in (loss, own, scale) if value is not None]
    rest, totals = join(shards, others, mine)
    loss, own = totals[:2]
    scale = totals[2] if len(totals) > 2 else None
    loss = loss - F.logsigmoid(own - rest)
    lse = torch.where(ignored, rest, torch.logaddexp(own, rest))
    return reduced_loss(loss, None, scale, ignored, shards.classes, options), lse


def _losses_of_classes(
    backend: str, x: Tensor, classifier: Classifier, target: Tensor, owned: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return l - z and l of the rows whose target is here, and the log-sum-exp over the classes of the rows' other terms, [B]."""
    rows, bias = options._replace(reduction="none", weight=None), options.class_bias
    if bias is None:
        loss, lse = loss_of_rows(x, classifier, target, rows, backend)
        return loss, lse, torch.where(owned, -torch.inf, lse)
    # If all classes here are excluded, l and z are -inf. The gradient of l would be NaN, so z, whose gradient is finite, is l.
    excluded = (bias == -torch.inf).all()
    rows = rows._replace(class_bias=torch.where(excluded, 0, bias))
    loss, lse = loss_of_rows(x, classifier, target, rows, backend)
    score = lse - loss + bias.to(lse.dtype)[torch.where(owned, target, 0)]
    own = torch.where(excluded, score, lse)
    return torch.where(excluded, 0, loss), own, torch.where(owned | excluded, -torch.inf, lse)


def _terms_without_classes(x: Tensor, classifier: Classifier, options: LossOptions) -> RowTerms:
    """Return the terms of a process without classes. Its backward still takes part in the collectives."""
    _, displacements, tau, _, axis, mlp = classifier
    dtype = classifier.compute_dtype(x)
    margin = options.margin
    vector_margin = isinstance(margin, Tensor) and margin.dim() > 0
    tensors = (x, classifier.centers, displacements, tau, axis, *(mlp or ()), options.class_bias, margin)
    zero = _Zeros.apply(len(x), dtype, *(t for t in tensors if isinstance(t, Tensor)))  # type: ignore[no-untyped-call]
    smoothed = options.label_smoothing > 0
    return RowTerms(
        lse_others=torch.full_like(zero, -torch.inf),
        logit=zero,
        bias=None if options.class_bias is None else zero.detach(),
        weight=None if options.weight is None else zero.detach(),
        margin=zero.detach() if vector_margin else margin,
        sums=zero.detach() if smoothed else None,
        total_weight=zero.new_zeros(()) if smoothed else None,
        weighted_bias=zero.new_zeros(()) if smoothed and options.class_bias is not None else None,
    )


class _Zeros(torch.autograd.Function):
    """Zeros [rows] that depend on tensors, with gradients of zero."""

    @staticmethod
    def forward(ctx: Any, rows: int, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.tensors = [(t.shape, t.dtype) for t in tensors]
        return tensors[0].new_zeros(rows, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.tensors)
