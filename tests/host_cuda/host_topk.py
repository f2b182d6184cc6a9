"""Top-k of the host-compiled CUDA kernels, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .host_logits import _HALF, _array, operand_type


class HostTopk:
    """Top-k on the host, with the conversions that the binding makes.

    Args:
        module: The compiled kernels (tests/host_cuda/bindings.cpp).
        tensors: input, centers, displacements, tau.
        k: Number of classes.
        bias: Class bias, or None.
    """

    def __init__(
        self, module: Any, tensors: list[Tensor], k: int, bias: Tensor | None = None, need_lse: bool = True
    ) -> None:
        type_ = operand_type(tensors)
        sums = torch.float64 if type_ == "f64" else torch.float32
        operands = {name: dtype for dtype, name in _HALF.items()}.get(type_, sums)
        arrays = [_array(t.to(x)) for t, x in zip(tensors, (*[operands] * 3, sums), strict=True)]
        found = module.topk(
            type_, *arrays, None if bias is None else bias.to(sums).contiguous().numpy(), k, need_lse
        )
        self.values, self.classes, self.slots, self.lse = map(torch.from_numpy, found[:4])
        self.scratch_bytes, self.launches = found[4:]

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs."""
        return [self.values, self.classes, self.slots, self.lse]
