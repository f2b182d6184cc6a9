"""What all operators need of the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # kept alive: registrations end with them


def define(name: str, schema: str, kernel: Callable[..., Any], devices: Sequence[str]) -> None:
    """Make the operator `gistops::name` from a Python kernel that serves these dispatch keys ("CUDA", "CPU")."""
    library = torch.library.Library("gistops", "FRAGMENT")
    _libraries.append(library)
    library.define(f"{name}{schema}")
    for device in devices:
        library.impl(name, kernel, device)


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Give an operator that has been defined a kernel for a dispatch key."""
    library = torch.library.Library("gistops", "IMPL")
    _libraries.append(library)
    library.impl(name, kernel, key)


def autocast(name: str, operands: int = 3) -> None:
    """Give an operator whose first arguments are input, centers and (3 operands) displacements its rule under autocast.

    As torch's own matrix products: low precision where it is faster. A GPU multiplies in the autocast dtype. The CPU
    kernels compute in float32 from any mix of dtypes, so a cast there would lose bits and gain no time. What comes out
    is float32 either way, and tau is never cast.
    """
    for device in ("CPU", "CUDA"):
        implement(name, _autocast(name, device.lower(), operands), f"Autocast{device}")


def _autocast(name: str, device: str, operands: int) -> Callable[..., Any]:
    operator = getattr(torch.ops.gistops, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if device == "cuda":
                dtype = torch.get_autocast_dtype(device)
                cast = (x if x.dtype == torch.float64 else x.to(dtype) for x in arguments[:operands])
                arguments = (*cast, *arguments[operands:])
            return operator(*arguments)

    return kernel


def below_autocast() -> Any:
    """A context in which operators do not cast: for kernels that call operators, as a backward may run inside autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys.add(torch._C.DispatchKey.AutocastCUDA))


def knows_autocast(device: str) -> bool:
    """True if there is autocast for a type of device; torch.compile takes the answer as a constant."""
    return bool(torch.amp.is_autocast_available(device))


knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch 2.11 cannot trace it


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, norms and all sums: float64 if any argument is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def double_backward(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of all backward operators."""
    raise NotImplementedError(
        "the operators of gistops are differentiable once; for second derivatives use backend='reference'"
    )
