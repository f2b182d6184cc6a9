"""What the dispatcher knows of the operators beyond their kernels: fake kernels, autograd, autocast.

Each family of kernels has a pair of operators, `<name>_forward` and `<name>_backward`, of one schema. The compiled
family, `constellation`, is defined in `csrc/schema.cpp` with a kernel for the CPU and one for CUDA; the others are
defined here from Python. `complete()` adds to a family what all have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: As in csrc/schema.cpp, which has the shapes; a test compares them.
FORWARD_SCHEMA = (
    "(Tensor input, Tensor centers, Tensor displacements, Tensor tau, bool allow_tf32=False)"
    " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
    " Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
    " bool need_input, bool need_centers, bool need_displacements, bool need_tau,"
    " bool allow_tf32=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

_libraries: list[torch.library.Library] = []  # kept alive: registrations end with them


def define(family: str, forward: Kernel, backward: Kernel, devices: Sequence[str]) -> None:
    """Make the operators `gistops::<family>_forward` and `_backward` from Python kernels, and complete them.

    Args:
        family: the operators' name.
        forward: takes and returns what `FORWARD_SCHEMA` says.
        backward: takes and returns what `BACKWARD_SCHEMA` says; an empty tensor for each gradient not needed.
        devices: dispatch keys that the kernels serve: "CUDA", "CPU".
    """
    library = torch.library.Library("gistops", "FRAGMENT")
    _libraries.append(library)
    for name, schema, kernel in (
        ("forward", FORWARD_SCHEMA, forward),
        ("backward", BACKWARD_SCHEMA, backward),
    ):
        library.define(f"{family}_{name}{schema}")
        for device in devices:
            library.impl(f"{family}_{name}", kernel, device)
    complete(family)


def complete(family: str) -> None:
    """Add fake kernels, autograd and autocast to the operators of a family that has been defined."""
    forward, backward = f"gistops::{family}_forward", f"gistops::{family}_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _backward_of(family), setup_context=_save)
    torch.library.register_autograd(backward, _double_backward)
    library = torch.library.Library("gistops", "IMPL")
    _libraries.append(library)
    for device in ("CPU", "CUDA"):
        library.impl(f"{family}_forward", _autocast(family, device.lower()), f"Autocast{device}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, norms and all sums: float64 if any argument is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _forward_fake(
    input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
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
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    arguments = (input, centers, displacements, tau)
    needs = (need_input, need_centers, need_displacements, need_tau)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(arguments, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.allow_tf32 = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of(family: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = getattr(torch.ops.gistops, f"{family}_backward").default

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        needs = ctx.needs_input_grad[:4]
        gradients = operator(grad, *ctx.saved_tensors, *needs, ctx.allow_tf32)
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None

    return backward


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "gistops.constellation_logits is differentiable once; for second derivatives use backend='reference'"
    )


def _autocast(family: str, device: str) -> Kernel:
    """Under autocast, as torch's own matrix products: low precision where it is faster.

    A GPU multiplies in the autocast dtype. The CPU kernels compute in float32 from any mix of dtypes, so a cast
    there would lose bits and gain no time. Logits are float32 either way, and tau is never cast.
    """
    operator = getattr(torch.ops.gistops, f"{family}_forward").default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(
        input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if device == "cuda":
                dtype = torch.get_autocast_dtype(device)
                input, centers, displacements = (
                    x if x.dtype == torch.float64 else x.to(dtype) for x in (input, centers, displacements)
                )
            return operator(input, centers, displacements, tau, allow_tf32)

    return kernel
