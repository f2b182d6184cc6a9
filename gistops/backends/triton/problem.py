"""The arguments of a call, ready for kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import configs


@dataclass(frozen=True)
class Problem:
    """The arguments in one dtype, contiguous, and what follows from them.

    d is a multiple of 16, if need be by a copy with zeros behind each vector, which change no product and no norm.
    Rows that start anywhere would be read an element at a time, at several times the cost of that copy.
    """

    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    kind: configs.Kind

    @classmethod
    def of(
        cls, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool
    ) -> Problem:
        if input.dim() != 2 or any(
            x.dim() != 2 or x.shape[1] != input.shape[1] for x in (centers, displacements)
        ):
            shapes = [list(x.shape) for x in (input, centers, displacements)]
            raise RuntimeError(
                f"expected input [B, d], centers [K, d] and displacements [m, d], got {shapes}"
            )
        if tau.numel() != 1:
            raise RuntimeError(f"expected tau of one element, got shape {list(tau.shape)}")
        dtype = reduce(torch.promote_types, (x.dtype for x in (input, centers, displacements)))
        missing = -input.shape[1] % 16
        input, centers, displacements = (
            F.pad(x.to(dtype), (0, missing)) if missing else x.to(dtype).contiguous()
            for x in (input, centers, displacements)
        )
        return cls(input, centers, displacements, tau.contiguous(), configs.kind(dtype, allow_tf32))

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, K, d (a multiple of 16), M."""
        return *self.input.shape[:1], *self.centers.shape, self.displacements.shape[0] + 1

    @property
    def sums(self) -> torch.dtype:
        """The dtype of logits, norms and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def products(self) -> torch.dtype:
        """The dtype of H' and of what is stored: the arguments' own. The interpreter would truncate to bfloat16."""
        return self.sums if configs.INTERPRETED and self.dtype == torch.bfloat16 else self.dtype

    @property
    def small(self) -> configs.Small:
        return configs.SMALL[self.kind]

    def constants(self, *names: str) -> dict[str, Any]:
        """Constants that several kernels share, those named."""
        on_tensor_cores = self.kind == "tf32" and configs.target(self.input.device) in ("hopper", "ampere")
        every = {
            "ACC": tl.float64 if self.sums == torch.float64 else tl.float32,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            # Norms are as precise as float32 whatever the setting: three products of parts where there is tf32.
            "NORM_PRECISION": "tf32x3" if on_tensor_cores else "ieee",
            "WIDEN": configs.INTERPRETED,
        }
        return {name: every[name] for name in names}


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
