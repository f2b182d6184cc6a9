"""The work that a variant must do at least, counted, and the least time that physics allows for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..problem import Size
from .variants import TABLE

#: Precision -> bytes of an element of input and centres. "float32" is torch's default, without tf32.
WIDTHS = {"bf16": 2, "float32": 4, "tf32": 4}


class Work(NamedTuple):
    """The work that a phase must do at least. A phase begins when the one before has ended, as the loss needs all logits."""

    flops: int  # of matrix products, a multiplication and an addition counted as two
    bytes: int  # each input read once, each output written once


def work(name: str, size: Size, kind: str, width: int) -> list[Work] | None:
    """The phases of one variant; None for the libraries' losses.

    Every variant of the constellation is held against the same count, that of the fused algebra: one large product and
    thin ones. A variant that does more work than that is further from its roofline, as it should be.

    Args:
        name: of the variant.
        size: B, K, d, m.
        kind: "forward", "step" or "loss".
        width: bytes of an element of input, centres and displacements.
    """
    variant = TABLE[name]
    if variant.family == "peer":
        return None
    B, K, d, _ = size.B, size.K, size.d, size.m
    m = 0 if variant.cosine else size.m
    main = 2 * B * K * d
    if name == "linear":
        arguments, logits = width * d * (B + K), width * B * K
        forward = Work(main, arguments + logits)
        backward = Work(2 * main, logits + 2 * arguments)
        loss = Work(0, 2 * logits)
    else:
        thin = 2 * (B + K) * (m + 1) * d  # with the bare centre's and the feature's own norms
        arguments, logits, slots = width * d * (B + K + m), 4 * B * K, B * K
        if kind == "loss":  # no logits to read or write
            return [Work(main + thin, arguments), Work(2 * main + 2 * thin, 2 * arguments)]
        forward = Work(main + thin, arguments + logits + slots)
        backward = Work(2 * main + 2 * thin, 2 * logits + slots + 2 * arguments)
        loss = Work(0, 2 * logits)
    return [forward] if kind == "forward" else [forward, loss, backward]


def floor_ms(phases: Sequence[Work], flops: float, bandwidth: float) -> float:
    """The roofline: milliseconds that the phases take at the measured ceilings.

    Args:
        phases: what is done, one after another.
        flops: per second, of a large matrix product in this precision.
        bandwidth: bytes per second, read and written.
    """
    return 1e3 * sum(max(phase.flops / flops, phase.bytes / bandwidth) for phase in phases)
