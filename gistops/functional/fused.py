"""What the public operators need of a fused backend: its operators' names, and what stands for a missing argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends


def fused(
    backend: str, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """logits and slots from a backend's operator; centers [K, d], or [K, M, d] with no displacements."""
    name = family(backend)
    if centers.dim() == 3 and backend != "cpu":
        name = f"{backend}_free"
    forward = getattr(torch.ops.gistops, f"{name}_forward").default
    logits, slots = forward(input, centers, displacements, tau, allow_tf32(backend))[:2]
    return logits, slots


def family(backend: str) -> str:
    """The family of operators that a fused backend uses."""
    return "triton" if backend == "triton" else "constellation"


def no_displacements(input: Tensor) -> Tensor:
    """What stands for δ where there is none: [0, d]."""
    return input.new_empty(0, input.shape[-1])


def allow_tf32(backend: str) -> bool:
    """Whether float32 products may be made in tf32; on the CPU there is none."""
    return backend != "cpu" and backends.allow_tf32()
