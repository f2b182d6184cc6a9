"""The logits of the host-compiled CUDA kernels, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HALF = {torch.bfloat16: "bf16", torch.float16: "f16"}


def operand_type(tensors: list[Tensor]) -> str:
    """Return the type to which the binding (csrc/cuda/binding.h) converts these operands."""
    dtypes = {t.dtype for t in tensors[:3] if t.numel()}
    if torch.float64 in {t.dtype for t in tensors[:3]}:
        return "f64"
    if len(dtypes) == 1 and (half := _HALF.get(next(iter(dtypes)))):
        return half
    return "f32"


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype in _HALF else tensor).numpy()


class HostLogits:
    """Forward and backward on the host, with the conversions that the binding makes.

    Args:
        module: The compiled kernels (tests/host_cuda/bindings.cpp).
        tensors: input, centers, displacements, tau.
        need_slots, narrow: as in `LogitsResults` of csrc/cuda/op_table.h.
    """

    def __init__(
        self, module: Any, tensors: list[Tensor], need_slots: bool = True, narrow: bool = False
    ) -> None:
        self.module = module
        self.tensors = tensors
        self.type = operand_type(tensors)
        half = {name: dtype for dtype, name in _HALF.items()}
        self.sums = torch.float64 if self.type == "f64" else torch.float32
        self.operands = half.get(self.type, self.sums)
        dtypes = (*[self.operands] * 3, self.sums)
        self.arrays = [_array(t.detach().to(dtype)) for t, dtype in zip(tensors, dtypes, strict=True)]
        self.narrow = narrow
        self.saved = module.logits_forward(self.type, *self.arrays, need_slots, narrow)
        self.logits, self.slots, self.center_rnorms, self.input_rnorms = map(torch.from_numpy, self.saved)
        if self.logits.dtype == torch.uint16:
            self.logits = self.logits.view(self.operands)

    def gradients(
        self, grad: Tensor, needs: tuple[bool, bool, bool, bool] = (True, True, True, True)
    ) -> list[Tensor | None]:
        """Return the gradients of the arguments in their shapes and dtypes; None if not needed."""
        grad = grad.to(self.logits.dtype)
        values = self.module.logits_backward(
            self.type, _array(grad), *self.arrays, *self.saved, *needs, self.narrow
        )
        gradients: list[Tensor | None] = []
        for value, tensor, needed in zip(values, self.tensors, needs, strict=True):
            if not needed:
                gradients.append(None)
                continue
            gradient = torch.from_numpy(value)
            if gradient.dtype == torch.uint16:
                gradient = gradient.view(self.operands)
            gradients.append(gradient.to(tensor.dtype).reshape(tensor.shape))
        return gradients
