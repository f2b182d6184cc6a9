"""The reference backend: the definition of the operator, in plain PyTorch.

Every other backend is judged by it. It scores each vector `w_k + δ_j` directly and shares no algebra with the fused
form, so that a mistake in one cannot hide in the other.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import on_device
from ..operators.registry import knows_autocast

#: Upper bound on the elements of one chunk's [k, M, d] vectors and [B, k, M] scores (64 MiB in float32).
CHUNK_ELEMENTS = 1 << 24


def constellation_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """`τ · max_j cos(f_i, w_k + δ_j)` with `δ_0 = 0`, and the lowest `j` that attains it.

    Memory beyond the outputs is bounded by `CHUNK_ELEMENTS`, in the backward too (chunks are recomputed there).

    Args:
        input: features f, [B, d].
        centers: class centres w, [K, d].
        displacements: shared displacements δ_1..δ_m, [m, d].
        tau: temperature τ, a tensor of one element.

    Returns:
        logits [B, K] in float64 if any argument but tau is float64, otherwise float32; slots [B, K] uint8.
    """
    dtype = torch.float32
    if torch.float64 in (input.dtype, centers.dtype, displacements.dtype):
        dtype = torch.float64
    device = input.device.type
    with torch.autocast(device, enabled=False) if knows_autocast(device) else nullcontext():
        unit = F.normalize(input.to(dtype), dim=1, eps=1e-12)
        structure = F.pad(displacements.to(dtype), (0, 0, 1, 0))  # [M, d], row 0 the bare centre
        scale = tau.to(dtype).reshape(())
        slots_count, d = structure.shape
        # A graph must hold for any batch: there the batch has no say in the chunks.
        rows = d if torch.compiler.is_compiling() else max(d, input.shape[0])
        chunk = max(1, CHUNK_ELEMENTS // (slots_count * rows))
        logits, slots = [], []
        for start in range(0, centers.shape[0], chunk):
            part = centers[start : start + chunk].to(dtype)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                best, slot = checkpoint(best_cosine, unit, part, structure, use_reentrant=False)
            else:
                best, slot = best_cosine(unit, part, structure)
            logits.append(scale * best)
            slots.append(slot)
        if not logits:
            empty = unit.new_zeros(unit.shape[0], 0)
            return empty, empty.to(torch.uint8)
        return torch.cat(logits, dim=1), torch.cat(slots, dim=1)


def best_cosine(unit: Tensor, centers: Tensor, structure: Tensor) -> tuple[Tensor, Tensor]:
    """The direct form: unit features [B, d], centers [k, d], δ_0..δ_m [M, d] -> best cosine and its slot, [B, k]."""
    vectors = centers[:, None, :] + structure  # [k, M, d]
    vectors = F.normalize(vectors, dim=2, eps=1e-12)
    scores = unit @ vectors.flatten(0, 1).T  # [B, k·M]
    best, slot = scores.unflatten(1, vectors.shape[:2]).max(dim=2)
    return best, slot.to(torch.uint8)


def subcenter_logits(input: Tensor, centers: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """`τ · max_j cos(f_i, w_kj)` of free centres [K, M, d], and the lowest j; otherwise as `constellation_logits`."""
    dtype = torch.float64 if torch.float64 in (input.dtype, centers.dtype) else torch.float32
    device = input.device.type
    with torch.autocast(device, enabled=False) if knows_autocast(device) else nullcontext():
        unit = F.normalize(input.to(dtype), dim=1, eps=1e-12)
        vectors = F.normalize(centers.to(dtype), dim=2, eps=1e-12)
        scores = (unit @ vectors.flatten(0, 1).T).unflatten(1, centers.shape[:2])
        best, slot = scores.max(dim=2)
        return tau.to(dtype).reshape(()) * best, slot.to(torch.uint8)


def rotated_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, axis: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of centres [K, d] and their rotations from `axis` to each displacement, each written out as a matrix."""
    wide = torch.float64 in (input.dtype, centers.dtype, displacements.dtype)
    dtype = torch.float64 if wide else torch.float32
    w = centers.to(dtype)
    u = F.normalize(axis.to(dtype), dim=0, eps=1e-12)
    vectors = [w]
    for delta in F.normalize(displacements.to(dtype), dim=1, eps=1e-12):
        c = delta @ u
        rest = delta - c * u
        s = rest.norm()
        v = rest / s.clamp(min=1e-12)
        turn = (c - 1) * (torch.outer(u, u) + torch.outer(v, v)) + s * (torch.outer(v, u) - torch.outer(u, v))
        vectors.append(w + w @ turn.T)
    return subcenter_logits(input, torch.stack(vectors, 1), tau)


def mlp_logits(
    input: Tensor, centers: Tensor, displacements: Tensor, mlp: tuple[Tensor, Tensor], tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of centres [K, d] and of w + B relu(A [ŵ; δ_j]), with A [h, 2d] and B [d, h]."""
    wide = torch.float64 in (input.dtype, centers.dtype, displacements.dtype, mlp[0].dtype, mlp[1].dtype)
    dtype = torch.float64 if wide else torch.float32
    device = input.device.type
    with torch.autocast(device, enabled=False) if knows_autocast(device) else nullcontext():
        w, first, second = centers.to(dtype), mlp[0].to(dtype), mlp[1].to(dtype)
        unit = F.normalize(w, dim=1, eps=1e-12)
        vectors = [w]
        for delta in displacements.to(dtype):
            both = torch.cat([unit, delta.expand_as(unit)], dim=1)
            vectors.append(w + (both @ first.T).relu() @ second.T)
    return subcenter_logits(input, torch.stack(vectors, 1), tau)


def logits(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """logits and slots, whatever the displacements do."""
    if axis is not None:
        return rotated_logits(input, centers, displacements, axis, tau)
    if mlp is not None:
        return mlp_logits(input, centers, displacements, mlp, tau)
    if centers.dim() == 3:
        return subcenter_logits(input, centers, tau)
    return constellation_logits(input, centers, displacements, tau)


def cross_entropy(
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
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`F.cross_entropy` of logits that are held, and their log-sum-exp [B]; arguments as the public function's."""
    scores, _ = logits(input, centers, displacements, tau, axis, mlp)
    if margin is not None:
        own = F.one_hot(torch.where(target == ignore_index, 0, target), centers.shape[0]).bool()
        scale = tau.to(scores.dtype).reshape(())
        cosine_limit = 1 - torch.finfo(scores.dtype).eps  # acos has no finite derivative at 1
        angle = (scores / scale).clamp(-cosine_limit, cosine_limit).acos()
        if not isinstance(margin, Tensor):
            margin = on_device(margin, scores.dtype, scores.device)
        margin = margin.to(scores)
        lowered = {
            "logit": lambda: scores - margin,
            "cosine": lambda: scores - scale * margin,
            "angle": lambda: torch.where(
                angle + margin > torch.pi,
                scores - scale * margin * margin.sin(),
                scale * (angle + margin).cos(),
            ),
        }[margin_kind]()
        scores = torch.where(own & (target != ignore_index)[:, None], lowered, scores)
    if class_bias is not None:
        scores = scores + class_bias.to(scores.dtype)
    loss = F.cross_entropy(
        scores,
        target,
        None if weight is None else weight.to(scores.dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss, scores.logsumexp(1)


def topk(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    k: int,
    axis: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest logits of each row, their classes and slots, and the log-sum-exp of all."""
    scores, slots = logits(input, centers, displacements, tau, axis, mlp)
    if class_bias is not None:
        scores = scores + class_bias.to(scores.dtype)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order, slots.gather(1, order), scores.logsumexp(1)
