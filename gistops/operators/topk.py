"""The op `topk`: the best classes of each row, without logits [B, K]. `csrc/schema.cpp` describes the arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Op, SymInt, compute_dtype


class Topk(NamedTuple):
    """Arguments of `topk`."""

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    class_bias: Tensor | None
    directions: Tensor | None
    turns: Tensor | None
    k: SymInt
    need_lse: bool = False
    allow_tf32: bool = False
    norms: Tensor | None = None


class Best(NamedTuple):
    """Outputs of `topk`."""

    values: Tensor
    classes: Tensor
    slots: Tensor
    lse: Tensor


def _fake(a: Topk) -> Best:
    dtype = compute_dtype(a.input, a.centers, a.displacements)
    batch = a.input.shape[0]
    return Best(
        a.input.new_empty(batch, a.k, dtype=dtype),
        a.input.new_empty(batch, a.k, dtype=torch.int64),
        a.input.new_empty(batch, a.k, dtype=torch.uint8),
        a.input.new_empty(batch if a.need_lse else 0, dtype=dtype),
    )


TOPK = Op("topk", Topk, Best, _fake, autocast=3)


class FusedTopk(NamedTuple):
    """Arguments of `fused_topk`."""

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    class_bias: Tensor | None
    k: SymInt
    need_lse: bool = False
    allow_tf32: bool = False


def _fake_fused(a: FusedTopk) -> Best:
    return _fake(Topk(*a[:5], None, None, *a[5:]))


#: `topk` by kernels of its own on GPUs, which call it where `can_fuse` is true.
FUSED_TOPK = Op("fused_topk", FusedTopk, Best, _fake_fused)

MOST_FUSED_K, MOST_FUSED_CLASSES = 128, 1 << 24  # as in csrc/cuda/op_table.h


def can_fuse(a: Topk) -> bool:
    """Return True if `fused_topk` serves the call: translations, few results and at most 2^24 classes."""
    translation = a.centers.dim() == 2 and a.directions is None and a.turns is None
    return translation and a.k <= MOST_FUSED_K and a.centers.shape[0] <= MOST_FUSED_CLASSES


def fused_arguments(a: Topk) -> FusedTopk:
    """Return the arguments of `fused_topk` for a call of `topk` that it serves."""
    return FusedTopk(*a[:5], a.k, a.need_lse, a.allow_tf32)
