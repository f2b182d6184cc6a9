"""The arguments that the launches of one call share, and torch's matrix product into a given tensor."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import configs
from .argument_checks import check_vectors
from .tile_tables import Kind, Target, TileSizes


class LaunchArgs(NamedTuple):
    """The arguments of a call, contiguous and in one dtype, with their sizes, dtypes and tiles.

    d is a multiple of 16. If necessary, the vectors are copied with zeros appended, which change no product and no norm:
    unaligned rows would be read one element at a time, at several times the cost of the copy.
    """

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    kind: Kind
    sizes: tuple[int, int, int, int]  # B, K, d (a multiple of 16), M
    dtype: torch.dtype
    acc_dtype: torch.dtype  # dtype of logits, norms and sums
    store_dtype: torch.dtype  # dtype of H' and gradients: `dtype`; differs for bfloat16 if interpreted
    tile_sizes: TileSizes
    input_coeffs: Tensor | None = None  # of rotations [B, coeff_slots]
    class_coeffs: Tensor | None = None  # [2, coeff_slots, K]; of a chunk a view

    @property
    def coeff_slots(self) -> int:
        """The slots of rotations; 0 for other forms."""
        return 0 if self.input_coeffs is None else self.input_coeffs.shape[1]

    @classmethod
    def of(
        cls, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool
    ) -> LaunchArgs:
        """Check the arguments and return them ready for kernels."""
        check_vectors(input, centers, displacements, tau)
        dtype = torch.promote_types(torch.promote_types(input.dtype, centers.dtype), displacements.dtype)
        (B, d), K, m = input.shape, centers.shape[0], displacements.shape[0]
        padding = -d % 16
        input, centers, displacements = (_prepare(x, dtype, padding) for x in (input, centers, displacements))
        acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        kind = configs.kind(dtype, allow_tf32)
        return cls(
            input, centers, displacements, tau.contiguous(), kind, (B, K, d + padding, m + 1), dtype, acc_dtype,
            # The interpreter would truncate to bfloat16 instead of rounding.
            acc_dtype if configs.INTERPRETED and dtype == torch.bfloat16 else dtype,
            configs.tile_sizes(input.device, kind),
        )  # fmt: skip

    def constants(self, *names: str) -> dict[str, Any]:
        """Return the named constants; several kernels take each of them."""
        return _constants(self.kind, self.dtype, configs.target(self.input.device), names)


def _prepare(x: Tensor, dtype: torch.dtype, padding: int) -> Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    return F.pad(x, (0, padding)) if padding else x.contiguous()


@functools.cache
def _constants(kind: Kind, dtype: torch.dtype, target: Target, names: tuple[str, ...]) -> dict[str, Any]:
    nvidia = target in ("hopper", "ampere")
    constants = {
        "ACC": tl.float64 if kind == "f64" else tl.float32,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        # Norms are as precise as float32 whatever allow_tf32 is: tf32x3 makes three products of split operands.
        "NORM_PRECISION": "tf32x3" if nvidia and kind == "tf32" else "ieee",
        # So are the corrections of ∂w. Two bfloat16 are precise enough; the exponent range of float16 is too small.
        "SPLIT_BF16": dtype == torch.bfloat16 and not configs.INTERPRETED,
        "CORRECTION_PRECISION": "tf32x3" if nvidia and kind in ("half", "tf32") else "ieee",
        "WIDEN": configs.INTERPRETED,
    }
    return {name: constants[name] for name in names}


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute a @ b into `out` with torch's library. The dtype of `out` may be wider, and its rows farther apart.

    `torch.mm` with `out` has no rule for autocast. Such a rule could turn float32 into half precision, and the kernel
    that reads the product would then read past its end; so the result is checked.
    """
    if configs.INTERPRETED:  # the CPU's product has no wider output
        a, b = a.to(out.dtype), b.to(out.dtype)
    pointer = out.data_ptr()
    result = torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)
    if result.dtype != out.dtype or result.data_ptr() != pointer:
        raise RuntimeError(
            f"torch.mm: expected to write {out.dtype} into out, got another tensor of {result.dtype}"
        )
    return out


_NO_CONTEXT = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton, which launches on the current device, launches on this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)
