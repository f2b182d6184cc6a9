"""Which vectors of the constellations are in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .constellation import ConstellationClassifier

#: Samples per slot below which an unused slot proves nothing.
ENOUGH = 100


class SlotUsage:
    """Histogram of winning slots: share of samples won by each slot of their own class, batch by batch.

    For its five slots the paper reports 25/23/18/17/17 % (GistNet, ICCV 2021). Feed it features, or, at no
    cost, the slots of a forward pass that is made anyway:

        usage = SlotUsage(head)
        for features, labels in batches:
            logits, slots = head(features, return_slots=True)
            usage.update_slots(slots, labels)
        print(usage.shares())

    `counts` is an int64 tensor [num_displacements + 1] on the head's device; several processes may sum theirs
    (`torch.distributed.all_reduce(usage.counts)`) before they ask for shares.

    Args:
        head: a `ConstellationClassifier` or `GistClassifier`, whose displacements it also warns about.
    """

    def __init__(self, head: ConstellationClassifier) -> None:
        self.head = head
        self.counts = torch.zeros(
            head.num_displacements + 1, dtype=torch.int64, device=head.displacements.device
        )

    @torch.no_grad()
    def update(self, input: Tensor, labels: Tensor | None = None) -> None:
        """Add samples.

        Args:
            input: features, [B, in_features].
            labels: their classes, [B], integer; without them a sample's own class is the predicted one.

        Raises:
            TypeError, ValueError: as `gistops.constellation_logits`, or the labels do not fit.
        """
        logits, slots = self.head(input, return_slots=True)
        self.update_slots(slots, logits.argmax(dim=1) if labels is None else labels)

    @torch.no_grad()
    def update_slots(self, slots: Tensor, labels: Tensor) -> None:
        """Add samples whose slots are known.

        Args:
            slots: as `head(input, return_slots=True)` gives them, [B, num_classes], uint8.
            labels: their classes, [B], integer.

        Raises:
            TypeError: labels are no integer tensor.
            ValueError: shapes do not fit.
        """
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected an integer torch.Tensor, got {got}")
        if slots.dim() != 2 or slots.shape[1] != self.head.num_classes:
            raise ValueError(f"slots: expected shape [B, {self.head.num_classes}], got {list(slots.shape)}")
        if labels.shape != slots.shape[:1]:
            raise ValueError(f"labels: expected shape [{slots.shape[0]}], got {list(labels.shape)}")
        won = slots.gather(1, labels.to(slots.device, torch.int64)[:, None])  # [B, 1]
        # Not bincount, which makes the host wait for a GPU.
        self.counts += (won == torch.arange(len(self.counts), device=slots.device)).sum(dim=0)

    def shares(self) -> Tensor:
        """Share of the samples won by each slot, [num_displacements + 1], float32; NaN without samples.

        Warns, once for each head, if its displacements are exactly zero, or if one of them has won none of
        the samples, of which there must be 100 a slot. (That slot 0 wins none is no loss: it has no
        parameters.)
        """
        shares = (self.counts.double() / self.counts.sum()).float()
        self.head._warn_if_zero()
        counts = self.counts.tolist()
        unused = [slot for slot, count in enumerate(counts) if slot and not count]
        if unused and sum(counts) >= ENOUGH * len(counts):
            self.head._warn(_advice(unused, counts))
        return shares


def _advice(unused: list[int], counts: list[int]) -> str:
    displacements = len(counts) - 1
    which = f"slots {', '.join(map(str, unused))} won none of {sum(counts)} samples"
    if len(unused) == displacements:
        which = f"slot 0, the bare centre, won all of {sum(counts)} samples"
    return (
        f"displacements are unused: {which}. Start them again at about a tenth of the centres' norm and "
        "train them at a lower learning rate, or start them from residuals of features against their class "
        f"means (add_displacements(values=...)), or do with num_displacements={displacements - len(unused)}."
    )
