"""The roofline: the minimal work of a variant, and the minimal time for this work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..problem import Size
from .variants import BEST, TABLE

#: Precision -> bytes per element of input and centers. "float32" is torch's default, without tf32.
WIDTHS = {"bf16": 2, "float32": 4, "tf32": 4}


class Work(NamedTuple):
    """The minimal work of a phase. A phase begins after the previous phase: the loss needs all logits."""

    flops: int  # operations of matmuls; a multiply-add counts as two
    bytes: int  # each input is read once, each output written once


def work(name: str, size: Size, kind: str, width: int) -> list[Work] | None:
    """Count the phases of a variant. None for the losses of other libraries.

    All constellation variants have the same count, that of the fused algebra: one large matmul and thin ones. A variant
    that does more work is further from its roofline.

    Args:
        name: name of the variant.
        size: B, K, d, m.
        kind: one of variants.KINDS.
        width: bytes per element of input, centers and displacements.
    """
    variant = TABLE[name]
    if variant.family == "peer":
        return None
    B, K, d, _ = size.B, size.K, size.d, size.m
    m = 0 if variant.cosine else size.m
    main, best = 2 * B * K * d, B * min(BEST, K) * 13  # values, classes and slots of a top-k
    if name == "linear":
        arguments, logits = width * d * (B + K), width * B * K
        forward = Work(main, arguments + logits)
        backward = Work(2 * main, logits + 2 * arguments)
        loss = Work(0, 2 * logits)
        if kind == "topk":
            return [forward, Work(0, logits + best)]
    else:
        thin = 2 * (B + K) * (m + 1) * d  # including the norms of the centers and of the input
        # A forward without gradients writes slots only if they are returned.
        slots = B * K if kind == "step" or variant.slots else 0
        arguments, logits = width * d * (B + K + m), (width if variant.narrow else 4) * B * K
        if kind == "topk":  # nor here
            return [Work(main + thin, arguments + best)]
        if kind == "loss":  # no logits are read or written
            return [Work(main + thin, arguments), Work(2 * main + 2 * thin, 2 * arguments)]
        forward = Work(main + thin, arguments + logits + slots)
        backward = Work(2 * main + 2 * thin, 2 * logits + slots + 2 * arguments)
        loss = Work(0, 2 * logits)
    return [forward] if kind == "forward" else [forward, loss, backward]


def floor_ms(phases: Sequence[Work], flops: float, bandwidth: float) -> float:
    """Return the milliseconds of the phases at the measured ceilings.

    Args:
        phases: the phases, one after another.
        flops: flop per second of a large matmul in this precision.
        bandwidth: bytes per second, read plus written.
    """
    return 1e3 * sum(max(phase.flops / flops, phase.bytes / bandwidth) for phase in phases)
