"""The derivatives that the fused ops do not have: forward mode, `torch.func.grad` and what is built from them.

The ops have a formula for reverse mode, once. In forward mode an op would pass derivatives of zero on in silence. The reference
backend is plain PyTorch, so every transform of `torch.func` and every dual number goes through it.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_NAMES = {"Grad": "torch.func.grad, vjp or jacrev", "Jvp": "torch.func.jvp or jacfwd"}


def unsupported_transform() -> str | None:
    """Return the name of an active transform that the fused ops do not support, or None.

    `torch.vmap` alone is supported: an op runs once per sample.
    """
    if torch._C._are_functorch_transforms_active():
        for interpreter in torch._C._functorch.get_interpreter_stack() or ():
            if name := _NAMES.get(interpreter.key().name):
                return name
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad"
    return None


def transforms_active() -> bool:
    """Return True inside any transform of `torch.func`, whose tensors are wrapped and have no data of their own."""
    return bool(torch._C._are_functorch_transforms_active())


def all_samples(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor of all samples of each active `torch.vmap`, for ops that have no rule of vmap; x itself outside."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return x


def is_wrapped(*tensors: torch.Tensor | None) -> bool:
    """Return True if a tensor is a wrapper of a transform, such as a gradient under `is_grads_batched`."""
    functorch = torch._C._functorch
    return any(
        t is not None and (functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )


# torch.compile guards on both levels by itself, so the results are constants of a graph.
unsupported_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
