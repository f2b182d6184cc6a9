"""The cross-entropy of the host-compiled CUDA kernels, on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .host_logits import _HALF, _array, operand_type

MARGIN_KINDS = ("logit", "cosine", "angle")
REDUCTIONS = ("none", "mean", "sum")


def _operands(tensors: list[Tensor]) -> tuple[str, torch.dtype, torch.dtype, list[Any]]:
    """Return the type of the operands, the dtypes of sums and operands, and the arrays of the tensors."""
    type = operand_type(tensors)
    half = {name: dtype for dtype, name in _HALF.items()}
    sums = torch.float64 if type == "f64" else torch.float32
    operands = half.get(type, sums)
    dtypes = (*[operands] * 3, sums)
    return (
        type,
        sums,
        operands,
        [_array(t.detach().to(dtype)) for t, dtype in zip(tensors, dtypes, strict=True)],
    )


class HostLoss:
    """Forward and backward on the host, with the conversions that the binding makes.

    Args:
        module: The compiled kernels (tests/host_cuda/bindings.cpp).
        tensors: input, centers (or sub-centers [K, M, d]), displacements, tau.
        target: Class indices, int64.
        scores: Where the scores are from the forward to the backward: "kept" in memory of their own, "parked" in the
            gradient of the centers, or "recomputed".
        saved: Results of a forward, for its backward; None: a forward is run.
        coeffs: input_coeffs and class_coeffs of rotations.
        options: Options of `constellation_cross_entropy`.
    """

    def __init__(
        self,
        module: Any,
        tensors: list[Tensor],
        target: Tensor,
        scores: str = "kept",
        saved: dict[str, Any] | None = None,
        coeffs: tuple[Tensor | None, Tensor | None] = (None, None),
        **options: Any,
    ) -> None:
        self.module = module
        self.tensors = tensors
        self.type, self.sums, self.operands, self.arrays = _operands(tensors)
        vectors = [options.get(name) for name in ("class_bias", "weight", "margin")]
        self.vectors = [None if v is None else torch.as_tensor(v).detach().to(self.sums) for v in vectors]
        self.coeffs = [None if c is None else c.detach().to(self.sums).contiguous() for c in coeffs]
        self.loss_arguments = module.Loss(
            target.numpy(),
            *(None if v is None else v.numpy() for v in self.vectors),
            MARGIN_KINDS.index(options.get("margin_kind", "logit")),
            REDUCTIONS.index(options.get("reduction", "mean")),
            options.get("ignore_index", -100),
            options.get("label_smoothing", 0.0),
            *(None if c is None else c.numpy() for c in self.coeffs),
        )
        if saved is not None:
            self.saved = saved
            return
        if scores == "parked":
            assert module.cross_entropy_parks(self.type, *self.arrays)
        self.saved = module.cross_entropy_forward(self.type, *self.arrays, self.loss_arguments, scores)
        reduced = options.get("reduction", "mean") != "none"
        self.loss = torch.from_numpy(self.saved["loss"]).reshape(() if reduced else (-1,))
        self.lse = torch.from_numpy(self.saved["lse"])
        self.targets_in_range = bool(self.saved["targets_in_range"][0])

    @staticmethod
    def parks(module: Any, tensors: list[Tensor]) -> bool:
        """Return True if the scores can be parked."""
        type, _, _, arrays = _operands(tensors)
        return bool(module.cross_entropy_parks(type, *arrays))

    def gradients(self, grad_loss: Tensor | None, grad_lse: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of the tensors, the coefficients, class_bias and margin; None if absent."""
        grads = [None if g is None else g.to(self.sums).contiguous().numpy() for g in (grad_loss, grad_lse)]
        values = self.module.cross_entropy_backward(
            self.type, *grads, *self.arrays, self.loss_arguments, self.saved
        )
        optional = (*self.coeffs, *self.vectors[::2])
        shapes = [*(t.shape for t in self.tensors), *(v if v is None else v.shape for v in optional)]
        gradients: list[Tensor | None] = []
        for value, shape in zip(values, shapes, strict=True):
            if value is None or shape is None:
                gradients.append(None)
                continue
            gradient = torch.from_numpy(value)
            if gradient.dtype == torch.uint16:
                gradient = gradient.view(self.operands)
            gradients.append(gradient.reshape(shape))
        return gradients
