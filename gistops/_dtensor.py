"""Tensors of `torch.distributed.tensor`, without importing it: most processes never do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Advice for a DTensor that a method finds where it needs another placement.
FSDP = (
    "With fully_shard (FSDP2), a method other than forward needs "
    "torch.distributed.fsdp.register_fsdp_forward_method(module, 'name of the method')"
)


def is_dtensor(value: object) -> bool:
    """Return True for a DTensor, also as a parameter."""
    return type(value).__name__ == "DTensor"


def whole(value: Tensor) -> Tensor:
    """Return all of a small DTensor, in every process; and any other tensor itself."""
    value = value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
    return value


def local(value: Any) -> Tensor:
    """Return this process's part of a DTensor, differentiable; and any other tensor itself."""
    part: Tensor = value.to_local() if is_dtensor(value) else value
    return part
