"""The k best scores of each row in a deterministic order: ties by the lower position, NaN first."""

from __future__ import annotations

import torch
from torch import Tensor


def join_best(best: tuple[Tensor, ...], more: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    """Return the k best of two sets of scores, classes and slots [B, ·], in descending order.

    Args:
        best: the first set, or () if there is none; wins ties.
        more: the second set.
        k: number of columns to return.
    """
    joined = [torch.cat(pair, 1) for pair in zip(best, more, strict=True)] if best else list(more)
    order = best_first(joined[0], k)[1]
    return tuple(x.gather(1, order) for x in joined)


def best_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row, or all if there are fewer, in descending order, and their positions."""
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64:
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], order[:, :k]
    # torch.topk does not define the order of ties, so each score gets a unique key: its bits, then its position.
    scores = torch.where(scores.isnan(), torch.nan, scores) + 0.0  # one NaN, one zero
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    positions = torch.arange(scores.shape[1], device=scores.device)
    order = ((ordered << 32) | (0x7FFFFFFF - positions)).topk(k, dim=1).indices
    return scores.gather(1, order), order
