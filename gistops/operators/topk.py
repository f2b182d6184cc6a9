"""The operator `<family>_topk`, the best classes of each row without logits [B, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from . import registry

#: As in csrc/schema.cpp, which says what it means; a test compares them.
SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
    " Tensor? feature_table, Tensor? class_tables, int k, bool need_lse=False, bool allow_tf32=False,"
    " Tensor? norms=None)"
    " -> (Tensor values, Tensor classes, Tensor slots, Tensor lse)"
)


def complete(family: str) -> None:
    """Add the fake kernel and autocast to the operator of a family; it has no gradient."""
    torch.library.register_fake(f"gistops::{family}_topk", _fake)
    registry.autocast(f"{family}_topk")


def _fake(
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    class_bias: Tensor | None,
    feature_table: Tensor | None,
    class_tables: Tensor | None,
    k: int,
    need_lse: bool = False,
    allow_tf32: bool = False,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = registry.compute_dtype(input, centers, displacements)
    batch = input.shape[0]
    return (
        input.new_empty(batch, k, dtype=dtype),
        input.new_empty(batch, k, dtype=torch.int64),
        input.new_empty(batch, k, dtype=torch.uint8),
        input.new_empty(batch if need_lse else 0, dtype=dtype),
    )
