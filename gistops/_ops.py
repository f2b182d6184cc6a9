"""What the dispatcher knows of the operators beyond their kernels: fake kernels, autograd, autocast.

The schemas and the kernels are in `csrc/`; `register()` runs once they are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORWARD = "gistops::constellation_forward"
BACKWARD = "gistops::constellation_backward"


def register() -> None:
    """Complete the operators of the library that has just been loaded."""
    global _library
    torch.library.register_fake(FORWARD, _forward_fake)
    torch.library.register_fake(BACKWARD, _backward_fake)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_save)
    torch.library.register_autograd(BACKWARD, _double_backward)
    _library = torch.library.Library("gistops", "IMPL")
    for device in ("CPU", "CUDA"):
        _library.impl("constellation_forward", _autocast(device.lower()), f"Autocast{device}")


_library: torch.library.Library | None = None  # kept alive: its registrations end with it


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, norms and all sums: float64 if any argument is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _forward_fake(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, classes, slots = input.shape[0], centers.shape[0], displacements.shape[0] + 1
    dtype = compute_dtype(input, centers, displacements)
    return (
        input.new_empty(batch, classes, dtype=dtype),
        input.new_empty(batch, classes, dtype=torch.uint8),
        input.new_empty(slots, classes, dtype=dtype),
        input.new_empty(batch, dtype=dtype),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    logits: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    need_input: bool,
    need_centers: bool,
    need_displacements: bool,
    need_tau: bool,
) -> tuple[Tensor, ...]:
    arguments = (input, centers, displacements, tau)
    needs = (need_input, need_centers, need_displacements, need_tau)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(arguments, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    needs = ctx.needs_input_grad
    gradients = torch.ops.gistops.constellation_backward.default(grad, *ctx.saved_tensors, *needs)
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "gistops.constellation_logits is differentiable once; for second derivatives use backend='reference'"
    )


def _autocast(device: str) -> Any:
    """Under autocast, as torch's own matrix products: low precision where it is faster.

    A GPU multiplies in the autocast dtype. The CPU kernels compute in float32 from any mix of dtypes, so a cast
    there would lose bits and gain no time. Logits are float32 either way, and tau is never cast.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if device == "cuda":
                dtype = torch.get_autocast_dtype(device)
                input, centers, displacements = (
                    x if x.dtype == torch.float64 else x.to(dtype) for x in (input, centers, displacements)
                )
            return torch.ops.gistops.constellation_forward.default(input, centers, displacements, tau)

    return kernel
