"""Centers moved by a small network (GistNet's MLP g), as sub-centers, one chunk of classes at a time.

    v_k0 = w_k,    v_kj = w_k + B relu(A [ŵ_k; δ_j])

with ŵ_k the unit vector of w_k, A [h, 2d] and B [d, h]. The backward recomputes the vectors of a chunk. An MLP takes M
matrix products where a translation or a rotation takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._classifier import Classifier, no_displacements
from ..._functorch import transforms_active
from ...backends.chunked.best import BestSoFar
from ...operators.registry import is_dynamic, no_autocast

#: Maximum number of elements in the vectors of a chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


def vectors(centers: Tensor, displacements: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return v [k, m + 1, d] of centers [k, d]; the hidden layer's term of ŵ is computed once for all slots.

    The vectors have the dtype of `first`, the dtype of the logits; centers may have another.
    """
    with no_autocast(centers.device.type):
        w = centers.to(first.dtype)
        weight_center, weight_displacement = first.split(centers.shape[1], dim=1)
        center_term = F.linear(F.normalize(w, dim=1, eps=1e-12), weight_center)
        hidden = (center_term[:, None] + F.linear(displacements, weight_displacement)).relu()
        return torch.cat([w[:, None], w[:, None] + F.linear(hidden, second)], dim=1)


def _converted(input: Tensor, classifier: Classifier) -> tuple[Tensor, Classifier]:
    """Return all that several chunks use in the dtype of the logits, so that its gradient is summed there."""
    assert classifier.mlp is not None
    dtype = classifier.compute_dtype(input)
    first, second = classifier.mlp
    return input.to(dtype), classifier._replace(
        displacements=classifier.displacements.to(dtype),
        tau=classifier.tau.to(dtype),
        mlp=(first.to(dtype), second.to(dtype)),
    )


def logits(
    ops: Any,
    input: Tensor,
    classifier: Classifier,
    allow_tf32: bool,
    need_slots: bool,
    logits_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return logits and slots [B, K] by the ops of a namespace; without `need_slots` the slots are empty."""

    def chunk_logits(input: Tensor, tau: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outputs = ops.subcenter_forward.default(input, v, tau, allow_tf32, need_slots, logits_dtype)
        return outputs[0], outputs[1]

    input, classifier = _converted(input, classifier)
    outputs = [_recomputed(chunk_logits, input, classifier, chunk) for chunk in _chunks(classifier)]
    slots = [slots for _, slots in outputs]
    return torch.cat([best for best, _ in outputs], 1), torch.cat(slots, 1) if need_slots else slots[0]


def cross_entropy_parts(
    ops: Any,
    input: Tensor,
    classifier: Classifier,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of `cross_entropy_parts_forward`."""

    def chunk_parts(
        input: Tensor, tau: Tensor, v: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, ...]:
        arguments = (
            input,
            v,
            no_displacements(input),
            tau,
            bias,
            None,
            None,
            target,
            weight,
            -100,
            allow_tf32,
        )
        return tuple(ops.cross_entropy_parts_forward.default(*arguments))

    input, classifier = _converted(input, classifier)
    classes = classifier.centers.shape[0]
    outputs = []
    for chunk in _chunks(classifier):
        local_target = _local_target(target, chunk, classes, ignore_index)
        bias = None if class_bias is None else class_bias[chunk]
        class_weight = None if weight is None else weight[chunk]
        outputs.append(_recomputed(chunk_parts, input, classifier, chunk, local_target, bias, class_weight))
    lse_others, target_logits, weighted_sums = zip(*outputs, strict=True)
    if len(outputs) == 1:
        return lse_others[0], target_logits[0], weighted_sums[0]
    return (
        torch.stack(lse_others).logsumexp(0),
        torch.stack(target_logits).sum(0),
        torch.stack(weighted_sums).sum(0),
    )


def _local_target(target: Tensor, chunk: slice, classes: int, ignore_index: int) -> Tensor:
    """Return the targets as classes of the chunk, and -100 for targets elsewhere and ignored ones.

    A target that is out of range stays out of range, so that the op refuses it.
    """
    out_of_range = (target != ignore_index) & ((target < 0) | (target >= classes))
    in_chunk = (target >= chunk.start) & (target < chunk.stop) & (target != ignore_index)
    return torch.where(out_of_range, -1, torch.where(in_chunk, target - chunk.start, -100))


def topk(
    ops: Any,
    input: Tensor,
    classifier: Classifier,
    class_bias: Tensor | None,
    k: int,
    need_lse: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of `topk`."""
    input, classifier = _converted(input, classifier)
    centers, displacements, tau = classifier[:3]
    best = BestSoFar(k)
    lse_of_chunks = []
    for chunk in _chunks(classifier):
        bias = None if class_bias is None else class_bias[chunk]
        assert classifier.mlp is not None
        v = vectors(centers[chunk], displacements, *classifier.mlp)
        count = min(k, chunk.stop - chunk.start)
        values, classes, slots, lse = ops.topk.default(
            input, v, no_displacements(input), tau, bias, None, None, count, need_lse, allow_tf32, None
        )
        best.add(values, classes + chunk.start, slots)
        lse_of_chunks.append(lse)
    values, classes, slots = best.result()
    return values, classes, slots, torch.stack(lse_of_chunks).logsumexp(0) if need_lse else lse_of_chunks[0]


def _chunks(classifier: Classifier) -> Iterable[slice]:
    """Return chunks of classes; one empty chunk if there is no class.

    A compiled graph with dynamic sizes has one chunk, because a number of chunks would make the sizes constant.
    """
    classes, d = classifier.centers.shape
    slots = classifier.displacements.shape[0] + 1
    if is_dynamic(classes, slots, d):
        return (slice(0, classes),)
    size = max(1, CHUNK_ELEMENTS // (slots * d))
    return (slice(start, min(start + size, classes)) for start in range(0, max(classes, 1), size))


def _recomputed(
    function: Callable[..., Any], input: Tensor, classifier: Classifier, chunk: slice, *rest: Tensor | None
) -> Any:
    """Return function(input, tau, vectors, *rest) of a chunk; the backward recomputes the vectors."""
    assert classifier.mlp is not None

    def compute(
        input: Tensor, tau: Tensor, w: Tensor, delta: Tensor, a: Tensor, b: Tensor, *rest: Any
    ) -> Any:
        return function(input, tau, vectors(w, delta, a, b), *rest)

    centers, displacements, tau = classifier[:3]
    arguments: tuple[Any, ...] = (input, tau, centers[chunk], displacements, *classifier.mlp, *rest)
    # torch.export(strict=True) cannot trace a checkpoint.
    if not torch.is_grad_enabled() or transforms_active() or torch.compiler.is_exporting():
        return compute(*arguments)
    return checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False)
