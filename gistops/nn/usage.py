"""Statistics of the winning slots, and warnings about displacements that do not learn."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import refuse_classes
from .._classifier import Classifier
from .._dtensor import is_dtensor, local
from ..functional.topk import topk

#: Samples per slot below which an unused slot proves nothing.
MIN_SAMPLES_PER_SLOT = 100


class ConstellationHead(Protocol):
    """The part of a `ConstellationClassifier` that this module needs."""

    displacements: nn.Parameter
    backend: str | None
    _warned: bool

    @property
    def num_classes(self) -> int: ...

    @property
    def num_displacements(self) -> int: ...

    def __call__(self, input: Tensor, /, *, return_slots: bool) -> Any: ...

    def _classifier(self) -> Classifier: ...


class SlotUsage:
    """The share of the samples that each slot wins, counted over batches.

    A sample counts for the slot with the highest cosine among those of its own class.
    The paper reports 25/23/18/17/17 % for its five slots (GistNet, ICCV 2021). `update()` takes features and computes
    the logits. `update_slots()` takes the slots of a forward pass that is computed anyway, at no further cost:

        usage = SlotUsage(head)
        for features, labels in batches:
            logits, slots = head(features, return_slots=True)
            usage.update_slots(slots, labels)
        print(usage.shares())

    `counts` is an int64 tensor [num_displacements + 1] on the head's device. After `add_displacements()` it has the new
    slots too; for a head with fewer displacements than before, the histogram begins anew. With several processes, sum it before
    `shares()`: `torch.distributed.all_reduce(usage.counts)`. With a sharded head, `update()` counts the samples of all processes.

    Args:
        head: a `ConstellationClassifier` or `GistClassifier`. `shares()` also warns about its displacements.

    Raises:
        TypeError: the head is of another kind.
    """

    def __init__(self, head: ConstellationHead) -> None:
        if not all(hasattr(head, name) for name in ("displacements", "num_displacements", "_warned")):
            kind = type(head).__name__
            raise TypeError(f"head: expected a ConstellationClassifier or a GistClassifier, got {kind}")
        self.head = head
        self.counts = torch.zeros(
            head.num_displacements + 1, dtype=torch.int64, device=head.displacements.device
        )

    @torch.no_grad()
    def update(self, input: Tensor, labels: Tensor | None = None) -> None:
        """Add samples.

        Args:
            input: features, [..., in_features].
            labels: classes, [...], integer. By default a sample's own class is the predicted one.

        Raises:
            TypeError, ValueError, IndexError: as for `gistops.constellation_logits` and `update_slots`.
        """
        classifier = self.head._classifier()
        if is_dtensor(classifier.centers):
            self._update_sharded(input, classifier, labels)
            return
        logits, slots = self.head(input, return_slots=True)
        self.update_slots(slots, logits.argmax(dim=-1) if labels is None else labels)

    def _update_sharded(self, input: Tensor, classifier: Classifier, labels: Tensor | None) -> None:
        from ..functional.sharded.topk import slot_counts

        if labels is None:
            labels = topk(input, classifier, 1, None, False, self.head.backend)[1][..., 0]
        self._follow_the_head()
        self.counts += slot_counts(input, classifier, labels, len(self.counts), self.head.backend)

    @torch.no_grad()
    def update_slots(self, slots: Tensor, labels: Tensor) -> None:
        """Add samples by their winning slots.

        Args:
            slots: slots that `head(input, return_slots=True)` returned, [..., num_classes], uint8.
            labels: classes, [...], integer.

        Raises:
            TypeError: slots or labels is not an integer tensor.
            ValueError: the shapes do not fit.
            IndexError: on the CPU, a label is out of range.
        """
        for name, value in (("slots", slots), ("labels", labels)):
            tensor = isinstance(value, Tensor)
            if not tensor or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                got = value.dtype if tensor else type(value).__name__
                raise TypeError(f"{name}: expected an integer torch.Tensor, got {got}")
        classes = self.head.num_classes
        if slots.dim() == 0 or slots.shape[-1] != classes:
            raise ValueError(f"slots: expected shape [..., {classes}], got {list(slots.shape)}")
        if labels.shape != slots.shape[:-1]:
            raise ValueError(f"labels: expected shape {list(slots.shape[:-1])}, got {list(labels.shape)}")
        # A GPU would wait for the check.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (labels.long() < 0) | (labels.long() >= classes)
            refuse_classes("labels", labels, outside, f"0 to {classes - 1}")
        self._follow_the_head()
        labels = labels.to(slots.device, torch.int64).reshape(-1, 1)
        won = slots.reshape(-1, classes).gather(1, labels)  # [B, 1]
        # bincount would synchronize with the GPU.
        self.counts += (won == torch.arange(len(self.counts), device=slots.device)).sum(dim=0)

    def _follow_the_head(self) -> None:
        """Fit `counts` to the number of displacements: added slots begin at 0; a head with fewer begins anew."""
        added = self.head.num_displacements + 1 - len(self.counts)
        if added:
            self.counts = (
                F.pad(self.counts, (0, added))
                if added > 0
                else self.counts.new_zeros(len(self.counts) + added)
            )

    def shares(self) -> Tensor:
        """Return the share of the samples won by each slot, [num_displacements + 1], float32; NaN without samples.

        Warns once per head if the displacements are exactly zero, or if a displacement has won none of at least
        100 samples per slot. (An unused slot 0 is fine: it has no parameters.)
        """
        self._follow_the_head()
        shares = (self.counts.double() / self.counts.sum()).float()
        warn_if_zero(self.head)
        counts = self.counts.tolist()
        unused = [slot for slot, count in enumerate(counts) if slot and not count]
        if unused and sum(counts) >= MIN_SAMPLES_PER_SLOT * len(counts):
            _warn_once(self.head, _unused_advice(unused, counts))
        return shares


def warn_if_zero(head: ConstellationHead) -> None:
    """Warn once per head if its displacements are exactly zero. Synchronizes with a GPU."""
    displacements = local(head.displacements.detach())
    # Fake and functional tensors, which are of other types, have no values to read.
    readable = type(displacements) is Tensor and not displacements.is_meta
    if readable and not head._warned and head.num_displacements and not displacements.any():
        _warn_once(
            head,
            "displacements are exactly zero: all slots tie, slot 0 wins every tie, and the displacements "
            "never get a gradient. Give them other values before training: by default this module draws "
            "random ones of about a tenth of the centers' norm.",
        )


def _warn_once(head: ConstellationHead, message: str) -> None:
    if not head._warned:
        head._warned = True
        warnings.warn(f"{type(head).__name__}: {message}", RuntimeWarning, stacklevel=4)


def _unused_advice(unused: list[int], counts: list[int]) -> str:
    displacements = len(counts) - 1
    finding = f"slots {', '.join(map(str, unused))} won none of {sum(counts)} samples"
    if len(unused) == displacements:
        finding = f"slot 0, the bare center, won all of {sum(counts)} samples"
    return (
        f"displacements are unused: {finding}. Start them again at about a tenth of the centers' norm and "
        "train them at a lower learning rate, or start them from residuals of features against their class "
        f"means (add_displacements(values=...)), or use num_displacements={displacements - len(unused)}."
    )
