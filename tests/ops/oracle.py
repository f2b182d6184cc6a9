"""Helpers of the tests of ops: samples, the definition in float64, and error bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops import backends
from gistops.backends import reference

#: How many times the error of the plain PyTorch form in the same dtype a backend's error may be. The fused form sums
#: |w|² + 2 w·δ + |δ|² unless that cancels by more than 8 (`cancels` in csrc): 4 roundings of the norm, 3 of the product.
FACTOR = 8.0


@dataclass(frozen=True)
class Sample:
    """Sizes and dtypes of one call. `spread` is |δ| / |w|."""

    B: int
    K: int
    d: int
    m: int
    input: torch.dtype = torch.float32
    centers: torch.dtype = torch.float32
    displacements: torch.dtype = torch.float32
    spread: float = 0.3

    @property
    def id(self) -> str:
        dtypes = "-".join(
            str(t).removeprefix("torch.") for t in (self.input, self.centers, self.displacements)
        )
        return f"{self.B}x{self.K}x{self.d}m{self.m}-{dtypes}"

    def tensors(self, seed: int, requires_grad: bool = True) -> list[Tensor]:
        """Return random input, centers, displacements and tau."""
        source = generator(seed)
        scale = self.d**-0.5
        values = [
            torch.randn(self.B, self.d, generator=source).to(self.input),
            (torch.randn(self.K, self.d, generator=source) * scale).to(self.centers),
            (torch.randn(self.m, self.d, generator=source) * scale * self.spread).to(self.displacements),
            torch.rand((), generator=source) * 20 + 4,
        ]
        return [v.requires_grad_(requires_grad) for v in values]


def generator(seed: int) -> torch.Generator:
    """Return a generator on the device under test."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def operators(backend: str) -> tuple[Any, Any]:
    """Return `logits_forward` and `logits_backward` of a fused backend."""
    ops = backends.ops(backend)
    return ops.logits_forward.default, ops.logits_backward.default


half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
# Odd sizes, larger than every block (256 rows, 512 classes, 512 dimensions).
SAMPLES = [
    Sample(517, 1043, 37, 4),
    Sample(19, 2101, 41, 4),
    Sample(300, 600, 130, 4),  # blocks large enough for oneDNN
    Sample(35, 67, 1031, 4),
    Sample(1, 1, 1, 0),
    Sample(5, 130, 3, 9, spread=1.0),
    Sample(33, 70, 16, 0),
    Sample(4, 70, 33, 255),
    Sample(70, 33, 24, 1),
    Sample(67, 129, 40, 4, f64, f64, f64),
    Sample(67, 129, 40, 4, bf16, bf16, bf16),
    Sample(67, 129, 40, 4, half, half, half),
    Sample(67, 129, 40, 4, bf16, torch.float32, torch.float32),
    Sample(67, 129, 40, 3, half, torch.float32, bf16),
    Sample(67, 129, 40, 3, torch.float32, f64, torch.float32),
]
IDS = [s.id for s in SAMPLES]


def scores(input: Tensor, centers: Tensor, displacements: Tensor) -> Tensor:
    """Return all cosines [B, K, M] by the definition; differentiable."""
    vectors = centers[:, None, :] + F.pad(displacements, (0, 0, 1, 0))
    return torch.einsum("bd,kmd->bkm", F.normalize(input, eps=1e-12), F.normalize(vectors, dim=2, eps=1e-12))


def routed(input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, slots: Tensor) -> Tensor:
    """Return the logits by the definition for given slots, as gradients flow through the chosen slot alone."""
    chosen = scores(input, centers, displacements).gather(2, slots.long()[..., None]).squeeze(2)
    return tau * chosen


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return new leaves with the same values."""
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]


def gradients(function: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the gradients of all tensors for a non-uniform gradient of the logits."""
    output = function(*tensors)
    return list(torch.autograd.grad(output, tensors, grad.to(output.dtype)))


def plain(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the reference backend's result in the dtypes of the sample, whose error is that of plain PyTorch."""
    return reference.constellation_logits(*tensors)


def error(value: Tensor, truth: Tensor) -> float:
    """Return the largest absolute error."""
    if not value.numel():
        return 0.0
    return float((value.detach().double() - truth.detach().double()).abs().max())


def allowed(plain_error: float, truth: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """Return the error bound: FACTOR times plain PyTorch's error, but at least FACTOR roundings of the largest value.

    A rounding is eps of `dtype`, and at least √terms · eps of float32 (float64 for float64).
    """
    size = float(truth.detach().abs().max()) if truth.numel() else 0.0
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return FACTOR * max(plain_error, max(torch.finfo(dtype).eps, terms**0.5 * sums) * max(size, 1e-30))


def check_values(values: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> None:
    """Assert that all errors are at most `bound` times one plus the largest of the expected values."""
    for value, true in zip(values, expected, strict=True):
        size = 1 + (float(true.detach().abs().max()) if true.numel() else 0)
        assert error(value, true) <= bound * size


def allowed_of_tau(grad: Tensor, logits: Tensor, tau: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Return the error bound of grad_tau, a sum over all pairs whose terms cancel: a few roundings of the terms' size."""
    terms = (
        grad.double() * logits.detach().double() / float(tau.detach())
    ).norm() + truth.detach().double().abs()
    return 16 * torch.finfo(dtype).eps * float(terms)


def errors_of_rounded_logits(
    wide: list[Tensor], slots: Tensor, logits: Tensor, grad: Tensor
) -> tuple[float, ...]:
    """Return bounds of the errors that the gradients of all tensors have because the backward reads rounded logits.

    The logits have a relative error of half an eps of their dtype. So have the terms grad times logits, of which grad_tau
    and the norm terms of the gradients of centers and displacements are sums.

    Args:
        wide: input, centers, displacements, tau in float64.
        slots, logits, grad: as returned, and as given to the backward.
    """
    half_eps = torch.finfo(logits.dtype).eps / 2
    _, centers, displacements, tau = (t.detach() for t in wide)
    vectors = centers[:, None] + F.pad(displacements, (0, 0, 1, 0))  # [K, M, d]
    errors = half_eps * (1 + half_eps) * (grad.detach().double() * logits.detach().double()).abs()
    won = F.one_hot(slots.long(), vectors.shape[1]).double()
    moments = torch.einsum("bk,bkm->km", errors, won) / vectors.square().sum(2).clamp(min=1e-24)
    terms = moments[:, :, None] * vectors.abs()
    largest_displacement = float(terms.sum(0)[1:].max()) if len(displacements) else 0.0
    return 0.0, float(terms.sum(1).max()), largest_displacement, float(errors.sum() / tau.abs())
