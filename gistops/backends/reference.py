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
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
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
