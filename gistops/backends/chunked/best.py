"""The k best scores of each row in a deterministic order: ties by the lower position, NaN first."""

from __future__ import annotations

import torch
from torch import Tensor


class BestSoFar:
    """The k best of chunks that are added in the order of the classes.

    Chunks are joined when they hold more than 2k columns, so that a score costs the same on average for any k.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, scores: Tensor, classes: Tensor, *slots: Tensor) -> None:
        """Add the best of a chunk, [B, ·] each, in the order of `best_first`; one tensor of slots per head."""
        self.parts.append((scores, classes, *slots))
        if sum(part[0].shape[1] for part in self.parts) > 2 * self.k:
            self._join()

    def result(self) -> tuple[Tensor, ...]:
        """Return scores, classes and slots [B, k] in descending order."""
        self._join()
        return self.parts[0]

    def _join(self) -> None:
        if len(self.parts) > 1:
            joined = [torch.cat(tensors, 1) for tensors in zip(*self.parts, strict=True)]
            order = best_first(joined[0], self.k)[1]
            self.parts = [tuple(x.gather(1, order) for x in joined)]


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
