"""The reference backend: the definition of the ops, in plain PyTorch.

Every other backend is tested against it. It scores each vector `w_k + δ_j` directly and shares no algebra with the fused
kernels, so that a mistake in the kernels cannot hide in the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import on_device
from .._classifier import Classifier, LossOptions
from .._functorch import transforms_active, unsupported_transform
from ..operators.registry import compute_dtype, is_dynamic, no_autocast, widest_dtype
from .in_place import detect_changes

#: Maximum number of elements in the vectors [k, M, d] and in the scores [B, k, M] of a chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


def normalized(x: Tensor, dim: int) -> Tensor:
    """Return `F.normalize(x, dim, eps=1e-12)`, but NaN where the norm has overflowed, which `F.normalize` makes zero."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm == torch.inf, torch.nan, norm).clamp(min=1e-12)


def lowest_equals(vectors: Tensor) -> Tensor:
    """Return the lowest slot [..., M] that holds the same vector as each slot of vectors [..., M, d]."""
    slots: list[Tensor] = []
    for slot in range(vectors.shape[-2]):
        equal = (vectors[..., :slot, :] == vectors[..., slot : slot + 1, :]).all(-1)
        slots.append(F.pad(equal.to(torch.uint8), (0, 1), value=1).argmax(-1))  # the first of equal maxima
    return torch.stack(slots, -1)


def first_best(scores: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of scores [B, K, M] and its slot, [B, K] each.

    Products sum equal columns in different orders, so that the higher of two slots with equal vectors may have the larger
    score. `lowest_equals` [K, M] or [M] leads to the lower one.
    """
    slots = scores.argmax(dim=2, keepdim=True)
    slots = lowest.expand(scores.shape).gather(2, slots)
    return scores.gather(2, slots).squeeze(2), slots.squeeze(2).to(torch.uint8)


def best_cosine(unit: Tensor, centers: Tensor, structure: Tensor) -> tuple[Tensor, Tensor]:
    """Return `max_j cos(f_i, w_k + δ_j)` and the lowest slot j that attains it, [B, K] each.

    Args:
        unit: f_i / |f_i|, [B, d].
        centers: w_k, [K, d].
        structure: δ_j, [M, d]; row 0 is zero, so that slot 0 is the bare center and slot j is w_k + δ_j.
    """
    vectors = centers[:, None, :] + structure  # [K, M, d]
    vectors = normalized(vectors, dim=2)
    scores = unit @ vectors.flatten(0, 1).T  # [B, K·M]
    # Not unflatten, which torch 2.11 cannot compile while a default device is set.
    return first_best(scores.reshape(unit.shape[0], *vectors.shape[:2]), lowest_equals(structure))


def constellation_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits `τ · max_j cos(f_i, w_k + δ_j)` and the slots, one chunk of classes at a time.

    `CHUNK_ELEMENTS` bounds the memory beyond the outputs, in the backward too, which recomputes the chunks. Arguments and
    outputs are those of `gistops.constellation_logits`.
    """
    dtype = compute_dtype(input, centers, displacements)
    with no_autocast(input.device.type):
        unit = normalized(input.to(dtype), dim=1)
        structure = F.pad(displacements.to(dtype), (0, 0, 1, 0))  # [M, d]; row 0 is zero
        scale = tau.to(dtype).reshape(())
        slots_count, d = structure.shape
        # A compiled graph serves any batch size, so there the chunks do not depend on the batch.
        rows = d if torch.compiler.is_compiling() else max(d, input.shape[0])
        if is_dynamic(centers.shape[0], slots_count, d):  # a number of chunks would make the sizes constant
            best, slot = best_cosine(unit, centers.to(dtype), structure)
            return scale * best, slot
        chunk = max(1, CHUNK_ELEMENTS // (slots_count * rows))
        # `checkpoint` has no derivative in forward mode, and none inside transforms.
        plain = not (torch.compiler.is_compiling() or transforms_active() or unsupported_transform())
        recompute = torch.is_grad_enabled() and plain
        logits, slots = [], []
        for start in range(0, centers.shape[0], chunk):
            part = centers[start : start + chunk].to(dtype)
            if recompute:
                best, slot = checkpoint(best_cosine, unit, part, structure, use_reentrant=False)
            else:
                best, slot = best_cosine(unit, part, structure)
            logits.append(scale * best)
            slots.append(slot)
        if not logits:
            empty = unit.new_zeros(unit.shape[0], 0)
            return empty, empty.to(torch.uint8)
        return torch.cat(logits, dim=1), torch.cat(slots, dim=1)


def subcenter_logits(input: Tensor, centers: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Return `τ · max_j cos(f_i, w_kj)` of sub-centers [K, M, d] and the lowest slot j that attains it."""
    dtype = compute_dtype(input, centers)
    with no_autocast(input.device.type):
        unit = normalized(input.to(dtype), dim=1)
        vectors = normalized(centers.to(dtype), dim=2)
        scores = (unit @ vectors.flatten(0, 1).T).reshape(unit.shape[0], *centers.shape[:2])
        best, slots = first_best(scores, lowest_equals(centers))
        return tau.to(dtype).reshape(()) * best, slots


def rotated_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, axis: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits and slots of centers [K, d] and of their rotations from `axis` to each displacement, as matrices."""
    dtype = compute_dtype(input, centers, displacements, axis)
    with no_autocast(input.device.type):
        w = centers.to(dtype)
        widest = widest_dtype(input.device.type)
        axis, displacements = axis.to(widest), displacements.to(widest)
        turns = [rotation(axis, delta).to(dtype) for delta in displacements]
        vectors = torch.stack([w, *(w + w @ turn.T for turn in turns)], 1)
    return subcenter_logits(input.to(dtype), vectors, tau)


def rotation(axis: Tensor, displacement: Tensor) -> Tensor:
    """Return R - I [d, d] of the rotation R from `axis` to `displacement`, both in float64.

    With u and v their unit vectors and A = v uᵀ - u vᵀ, R = I + A + A² / (1 + u·v), and 1 + u·v = |u + v|² / 2.
    `gistops.constellation_logits` defines the cases without a plane.
    """
    u, v = (normalized(x, dim=0) for x in (axis, displacement))
    skew = torch.outer(v, u) - torch.outer(u, v)
    middle = (u + v).square().sum()
    turn = skew + 2 * skew @ skew / middle.clamp(min=1e-24)
    e = (torch.arange(len(u), device=u.device) == u.abs().argmin()).to(u.dtype)
    e = normalized(e - (e @ u) * u, dim=0)
    half_turn = -2 * (torch.outer(u, u) + torch.outer(e, e))
    is_zero = (axis.norm() <= 1e-12) | (displacement.norm() <= 1e-12)
    return torch.where(is_zero, 0, torch.where(middle <= 1e-24, half_turn, turn))


def mlp_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, mlp: tuple[Tensor, Tensor], tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits and slots of centers w [K, d] and of w + B relu(A [ŵ; δ_j]), with A [h, 2d] and B [d, h]."""
    dtype = compute_dtype(input, centers, displacements, *mlp)
    with no_autocast(input.device.type):
        w, first, second = centers.to(dtype), mlp[0].to(dtype), mlp[1].to(dtype)
        unit = normalized(w, dim=1)
        vectors = [w]
        for delta in displacements.to(dtype):
            mlp_input = torch.cat([unit, delta.expand_as(unit)], dim=1)
            vectors.append(w + (mlp_input @ first.T).relu() @ second.T)
    return subcenter_logits(input.to(dtype), torch.stack(vectors, 1), tau)


def logits(input: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor]:
    """Return logits and slots of any classifier."""
    centers, displacements, tau, transform, axis, mlp = classifier
    if transform == "subcenters":
        return subcenter_logits(input, centers, tau)
    if axis is not None:
        return rotated_logits(input, centers, displacements, axis, tau)
    if mlp is not None:
        return mlp_logits(input, centers, displacements, mlp, tau)
    return constellation_logits(input, centers, displacements, tau)


def cross_entropy(
    input: Tensor, classifier: Classifier, target: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Return `F.cross_entropy` of materialized logits, and their log-sum-exp [B]."""
    watched = (*classifier[1:3], classifier.axis, *(classifier.mlp or ()), target, *options[:3])
    # The logits and the margin both use tau. Converted once here, its gradient is rounded once.
    classifier = classifier._replace(tau=classifier.tau.to(classifier.compute_dtype(input)))
    scale = classifier.tau.reshape(())
    cosines, _ = logits(input, classifier._replace(tau=torch.ones_like(scale)))
    scores = scale * cosines
    scores = detect_changes(scores, *watched)
    target, margin, ignore_index = target.long(), options.margin, options.ignore_index
    if margin is not None:
        # Not F.one_hot, which torch.func cannot transform.
        is_target = target[:, None] == torch.arange(scores.shape[1], device=target.device)
        cosine_limit = 1 - torch.finfo(scores.dtype).eps  # acos has no finite derivative at 1
        angle = cosines.clamp(-cosine_limit, cosine_limit).acos()
        if not isinstance(margin, Tensor):
            margin = on_device(margin, scores.dtype, scores.device)
        lowers = is_target & (target != ignore_index)[:, None]
        margin = torch.where(lowers, margin.to(scores), 0)  # others may be infinite
        lowered = {
            "logit": lambda: scores - margin,
            "cosine": lambda: scores - scale * margin,
            "angle": lambda: torch.where(
                angle + margin > torch.pi,
                scores - scale * margin * margin.sin(),
                scale * (angle + margin).cos(),
            ),
        }[options.margin_kind]()
        scores = torch.where(lowers, lowered, scores)
    if options.class_bias is not None:
        scores = scores + options.class_bias.to(scores.dtype)
    weight = None if options.weight is None else options.weight.to(scores.dtype)
    loss = F.cross_entropy(
        scores,
        target,
        weight,
        reduction="none",  # torch.func cannot transform the mean with weights and smoothing
        ignore_index=ignore_index,
        label_smoothing=options.label_smoothing,
    )
    ignored = target == ignore_index
    counted = (~ignored).to(scores.dtype)
    if weight is not None:
        counted = torch.where(ignored, 0, weight[torch.where(ignored, 0, target)])
    if options.reduction == "sum":
        loss = loss.sum()
    elif options.reduction == "mean":
        total = counted.sum()
        loss = loss.sum() / torch.where(total == 0, torch.nan, total)
    lse = scores.logsumexp(1)
    return loss, torch.where(lse == torch.inf, torch.nan, lse)


def cross_entropy_parts(
    input: Tensor,
    classifier: Classifier,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of `cross_entropy_parts_forward`, of materialized logits."""
    z, _ = logits(input, classifier)
    scores = z if class_bias is None else z + class_bias.to(z.dtype)
    is_target = target.long()[:, None] == torch.arange(z.shape[1], device=target.device)
    is_target = is_target & (target != ignore_index)[:, None]
    # Without `where`, the gradient of excluded classes would be NaN in a row that has no other classes.
    lse_others = torch.where(is_target | (scores == -torch.inf), -torch.inf, scores).logsumexp(1)
    sums = z.new_empty(0) if weight is None else z @ weight.to(z.dtype)
    return lse_others, torch.where(is_target, z, 0).sum(1), sums


def topk(
    input: Tensor, classifier: Classifier, class_bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the k largest logits of each row, their classes and slots, and the log-sum-exp over all classes.

    The log-sum-exp of a row with a score of +inf is +inf, unless another score is NaN.
    """
    scores, slots = logits(input, classifier)
    if class_bias is not None:
        scores = scores + class_bias.to(scores.dtype)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order, slots.gather(1, order), scores.logsumexp(1)
