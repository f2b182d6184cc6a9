"""Loss, top-k, sub-center and rotation ops from a namespace's logits kernels, one chunk of classes at a time.

GPUs use them. Nothing waits for the device. A chunk's scores and temporaries take about 15 bytes per score. Most calls
are one chunk, which saves launches, passes and copies: scores are overwritten where nothing else needs them, and no
gradient is accumulated. The backward recomputes the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...operators.cross_entropy_parts import (
    CROSS_ENTROPY_PARTS_BACKWARD,
    CROSS_ENTROPY_PARTS_FORWARD,
    Parts,
    PartsBackward,
    PartsForward,
    PartsGradients,
)
from ...operators.logits import (
    ROTATION_BACKWARD,
    ROTATION_FORWARD,
    SUBCENTER_BACKWARD,
    SUBCENTER_FORWARD,
    Logits,
    RotationBackward,
    RotationForward,
    RotationGradients,
    SubcenterBackward,
    SubcenterForward,
    SubcenterGradients,
)
from ...operators.registry import Op
from ...operators.topk import TOPK, Best, FusedTopk, Topk, can_fuse, fused_arguments
from .best import BestSoFar, best_first
from .scorers import GradientAccumulator, Needs, TranslationScorer, make_scorer


class ChunkedOps:
    """Kernels over `logits_forward` and `logits_backward` of a namespace, such as `torch.ops.gistops`.

    Args:
        ops: the namespace.
        fused_topk: the backend's kernels for calls of `topk`; None if it has none.
        can_fuse: return True if these kernels serve a call.
    """

    def __init__(
        self,
        ops: Any,
        fused_topk: Callable[[FusedTopk], Best] | None = None,
        can_fuse: Callable[[Topk], bool] = can_fuse,
    ) -> None:
        self.ops, self.fused_topk, self.can_fuse = ops, fused_topk, can_fuse

    def kernels(self) -> dict[Op, Callable[[Any], Any]]:
        """Return the kernel of each op."""
        return {
            SUBCENTER_FORWARD: self.subcenter_forward,
            SUBCENTER_BACKWARD: self.subcenter_backward,
            ROTATION_FORWARD: self.rotation_forward,
            ROTATION_BACKWARD: self.rotation_backward,
            CROSS_ENTROPY_PARTS_FORWARD: self.cross_entropy_parts_forward,
            CROSS_ENTROPY_PARTS_BACKWARD: self.cross_entropy_parts_backward,
            TOPK: self.topk,
        }

    def subcenter_forward(self, a: SubcenterForward) -> Logits:
        return _logits(make_scorer(self.ops, a), a)

    def subcenter_backward(self, a: SubcenterBackward) -> SubcenterGradients:
        needs = Needs(a.need_input, a.need_centers, False, a.need_tau)
        input, centers, _, tau, _, _ = _gradients(make_scorer(self.ops, a), a, needs)
        return SubcenterGradients(input, centers, tau)

    def rotation_forward(self, a: RotationForward) -> Logits:
        return _logits(make_scorer(self.ops, a), a)

    def rotation_backward(self, a: RotationBackward) -> RotationGradients:
        needs = Needs(a.need_input, a.need_centers, False, a.need_tau)
        input, centers, _, tau, directions, turns = _gradients(make_scorer(self.ops, a), a, needs)
        return RotationGradients(input, centers, tau, directions, turns)

    def cross_entropy_parts_forward(self, a: PartsForward) -> Parts:
        scorer, weight = make_scorer(self.ops, a), a.weight
        target_logits = a.input.new_zeros(a.input.shape[0], 1, dtype=scorer.dtype)
        sums = target_logits[:, 0] if weight is not None else a.input.new_empty(0, dtype=scorer.dtype)
        target = a.target.long()
        minus_infinity, counted = target_logits.new_full((), -torch.inf), target != a.ignore_index
        lse_of_chunks = []
        for chunk in scorer.chunks():
            z = scorer.forward(chunk, need_slots=False).logits
            columns, in_chunk = _targets(target, counted, chunk)
            target_scores = z.gather(1, columns)
            target_logits = torch.where(in_chunk, target_scores, target_logits)
            if weight is not None:
                sums = sums + (z * weight[chunk].to(z.dtype)).sum(1)
            if a.class_bias is not None:
                target_scores = z.add_(a.class_bias[chunk].to(z.dtype)).gather(1, columns)
            z.scatter_(1, columns, torch.where(in_chunk, minus_infinity, target_scores))
            lse_of_chunks.append(z.logsumexp(1))
        lse_others = _logsumexp(lse_of_chunks, minus_infinity.expand(a.input.shape[0]))
        lse_others = torch.where(lse_others == torch.inf, torch.nan, lse_others)  # as the other backends
        return Parts(lse_others, target_logits[:, 0], sums)

    def cross_entropy_parts_backward(self, a: PartsBackward) -> PartsGradients:
        scorer, weight, bias, lse = make_scorer(self.ops, a), a.weight, a.class_bias, a.lse_others
        needs = Needs(a.need_input, a.need_centers, a.need_displacements, a.need_tau)
        accumulator = GradientAccumulator(scorer, needs)
        need_bias = a.need_bias and bias is not None
        grad_bias = lse.new_empty(a.centers.shape[0] if need_bias else 0)
        shift = torch.where(lse == -torch.inf, torch.inf, lse)[:, None]  # no other class: probability 0
        target = a.target.long()
        zero, counted = lse.new_zeros(()), target != a.ignore_index
        for chunk in scorer.chunks():
            output = scorer.forward(chunk)
            columns, in_chunk = _targets(target, counted, chunk)
            z = output.logits if bias is None else output.logits + bias[chunk].to(lse.dtype)
            grad = (z - shift).exp_().mul_(a.grad_lse_others[:, None])
            grad_target = a.grad_target_logits[:, None]
            if need_bias:
                _overwrite_targets(grad, columns, in_chunk, zero)
                grad_bias[chunk] = grad.sum(0)
            if weight is not None:
                weights, grad_sums = weight[chunk].to(lse.dtype), a.grad_weighted_sums[:, None]
                grad.addcmul_(grad_sums, weights)
                grad_target = torch.addcmul(grad_target, grad_sums, weights[columns])
            _overwrite_targets(grad, columns, in_chunk, grad_target)
            accumulator.add(chunk, scorer.backward(chunk, grad, output, needs))
        input, centers, displacements, tau, *rotation = accumulator.gradients()
        grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
        return PartsGradients(input, centers, displacements, tau, grad_bias, *rotation)

    def topk(self, a: Topk) -> Best:
        """Return the best k classes; norms are recomputed, in the same pass as the products."""
        if self.fused_topk is not None and self.can_fuse(a):
            return self.fused_topk(fused_arguments(a))
        scorer = make_scorer(self.ops, a)
        best = BestSoFar(a.k)
        lse_of_chunks = []
        for chunk in scorer.chunks():
            output = scorer.forward(chunk)
            z = (
                output.logits
                if a.class_bias is None
                else output.logits + a.class_bias[chunk].to(output.logits.dtype)
            )
            if a.need_lse:
                lse_of_chunks.append(z.logsumexp(1))
            classes = torch.arange(chunk.start, chunk.stop, device=z.device).expand_as(z)
            values, order = best_first(z, a.k)
            best.add(values, classes.gather(1, order), output.slots.gather(1, order))
        empty = a.input.new_empty(0, dtype=scorer.dtype)
        values, classes, slots = best.result()
        return Best(values, classes, slots, _logsumexp(lse_of_chunks, empty) if a.need_lse else empty)


def _logits(scorer: TranslationScorer, a: SubcenterForward | RotationForward) -> Logits:
    """Concatenate the outputs of all chunks."""
    chunks = list(scorer.chunks()) or [slice(0, 0)]
    outputs = []
    for chunk in chunks:
        output = scorer.forward(chunk, a.need_slots)
        outputs.append(output._replace(logits=output.logits.to(a.logits_dtype or scorer.dtype)))
    if len(outputs) == 1:
        logits, slots, center_rnorms, input_rnorms = outputs[0]
        return Logits(logits, slots.contiguous(), center_rnorms.contiguous(), input_rnorms)
    logits, center_rnorms = (torch.cat([output[i] for output in outputs], 1) for i in (0, 2))
    slots = torch.cat([output.slots for output in outputs], 1) if a.need_slots else outputs[0].slots
    return Logits(logits, slots, center_rnorms, outputs[0].input_rnorms)


def _gradients(
    scorer: TranslationScorer, a: SubcenterBackward | RotationBackward, needs: Needs
) -> tuple[Tensor, ...]:
    accumulator = GradientAccumulator(scorer, needs)
    for chunk in scorer.chunks():
        logits, grad = (x[:, chunk].to(scorer.dtype) for x in (a.logits, a.grad))
        output = Logits(logits, a.slots[:, chunk], a.center_rnorms[:, chunk], a.input_rnorms)
        accumulator.add(chunk, scorer.backward(chunk, grad, output, needs))
    return accumulator.gradients()


def _targets(target: Tensor, counted: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Return the column of each row's target in the chunk, and True where it is there and counts, [B, 1] each."""
    local = target - chunk.start if chunk.start else target
    column = local.clamp(0, chunk.stop - chunk.start - 1)
    return column[:, None], ((column == local) & counted)[:, None]


def _overwrite_targets(scores: Tensor, columns: Tensor, in_chunk: Tensor, value: Tensor) -> None:
    scores.scatter_(1, columns, torch.where(in_chunk, value, scores.gather(1, columns)))


def _logsumexp(chunks: list[Tensor], default: Tensor) -> Tensor:
    """Combine the log-sum-exp of the chunks; `default` if there is no chunk."""
    if len(chunks) == 1:
        return chunks[0]
    return torch.stack(chunks).logsumexp(0) if chunks else default.contiguous()
