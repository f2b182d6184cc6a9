"""The arguments of a call, ready for kernels."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import configs


class LaunchArgs(NamedTuple):
    """The arguments in one dtype, contiguous, and what follows from them.

    d is a multiple of 16, if need be by a copy with zeros behind each vector, which change no product and no norm.
    Rows that start anywhere would be read an element at a time, at several times the cost of that copy.
    """

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    kind: configs.Kind
    sizes: tuple[int, int, int, int]  # B, K, d (a multiple of 16), M
    dtype: torch.dtype
    sums: torch.dtype  # of logits, norms and sums
    products: torch.dtype  # of H' and of what is stored: as `dtype`, but under the interpreter
    small: configs.Small

    @classmethod
    def of(
        cls, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool
    ) -> LaunchArgs:
        shapes = input.shape, centers.shape, displacements.shape
        if any(len(s) != 2 or s[1] != shapes[0][-1] for s in shapes):
            raise RuntimeError(
                "expected input [B, d], centers [K, d] and displacements [m, d],"
                f" got {[list(s) for s in shapes]}"
            )
        if tau.numel() != 1:
            raise RuntimeError(f"expected tau of one element, got shape {list(tau.shape)}")
        dtype = torch.promote_types(torch.promote_types(input.dtype, centers.dtype), displacements.dtype)
        (B, d), (K, _), (m, _) = shapes
        missing = -d % 16
        input, centers, displacements = (_ready(x, dtype, missing) for x in (input, centers, displacements))
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        kind = configs.kind(dtype, allow_tf32)
        return cls(
            input, centers, displacements, tau.contiguous(), kind, (B, K, d + missing, m + 1), dtype, sums,
            sums if configs.INTERPRETED and dtype == torch.bfloat16 else dtype,  # the interpreter would truncate
            configs.small(kind),
        )  # fmt: skip

    def constants(self, *names: str) -> dict[str, Any]:
        """Constants that several kernels share, those named."""
        return _constants(self.kind, self.dtype, configs.target(self.input.device), names)


def _ready(x: Tensor, dtype: torch.dtype, missing: int) -> Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    return F.pad(x, (0, missing)) if missing else x.contiguous()


@functools.cache
def _constants(
    kind: configs.Kind, dtype: torch.dtype, target: configs.Target, names: tuple[str, ...]
) -> dict[str, Any]:
    nvidia = target in ("hopper", "ampere")
    every = {
        "ACC": tl.float64 if kind == "f64" else tl.float32,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        # Norms are as precise as float32 whatever the setting: three products of parts where there is tf32.
        "NORM_PRECISION": "tf32x3" if nvidia and kind == "tf32" else "ieee",
        # So are the corrections of ∂w. Halves of bfloat16 are exact enough; float16 has too few exponents for them.
        "SPLIT_BF16": dtype == torch.bfloat16 and not configs.INTERPRETED,
        "CORRECTION_PRECISION": "tf32x3" if nvidia and kind in ("half", "tf32") else "ieee",
        "WIDEN": configs.INTERPRETED,
    }
    return {name: every[name] for name in names}


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b by torch's own library into `out`, whose dtype is at least as wide as theirs and rows as far apart as you like.

    `torch.mm` into a tensor has no rule under autocast. Without one it would turn float32 into half precision, which
    the kernel that goes on with the product would read past its end.
    """
    if configs.INTERPRETED:  # the CPU's product has no wider output
        a, b = a.to(out.dtype), b.to(out.dtype)
    return product_into(out, a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same, without what the interpreter needs."""
    pointer = out.data_ptr()
    made = torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)
    if made.dtype != out.dtype or made.data_ptr() != pointer:
        raise RuntimeError(
            f"torch.mm was to write {out.dtype} into a tensor, and gave another of {made.dtype}"
        )
    return out


_NOTHING = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)
