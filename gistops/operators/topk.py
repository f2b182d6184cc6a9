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
    input_coeffs: Tensor | None
    class_coeffs: Tensor | None
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
