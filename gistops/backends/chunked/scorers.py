"""Logits and gradients of one chunk of classes, from a namespace's `logits_forward` and `logits_backward`.

A scorer holds the arguments of one call. `forward(chunk)` returns the logits of the classes in a slice; `backward(chunk,
grad, output, needs)` returns gradients, those of the centers for the slice alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...operators.logits import Logits
from ...operators.registry import below_autocast, compute_dtype, nonzero_tau
from ..rotation_coeffs import center_dots, class_coeffs

#: Maximum number of scores in a chunk: 128 MiB in float32, so that 256 rows and 100,000 classes are one chunk. The
#: temporaries of a chunk take half a GiB at most. On the CPU, where caches are small and launches are free, 16 MiB.
CHUNK_ELEMENTS = 1 << 25
CPU_CHUNK_ELEMENTS = 1 << 22


class Needs(NamedTuple):
    """The gradients that the caller asks for; those of directions and turns are always computed."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool


class Gradients(NamedTuple):
    """Gradients of the arguments, None if not needed."""

    input: Tensor | None
    centers: Tensor | None
    displacements: Tensor | None
    tau: Tensor | None
    directions: Tensor | None = None
    turns: Tensor | None = None


@dataclass
class TranslationScorer:
    """Centers [K, d] and displacements [m, d]."""

    ops: Any  # the namespace
    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    allow_tf32: bool

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.input, self.centers, self.displacements)

    def chunks(self) -> Iterator[slice]:
        """Yield the chunks of classes."""
        vectors = self.centers.shape[1] if self.centers.dim() == 3 else 1
        elements = CHUNK_ELEMENTS if self.input.device.type == "cuda" else CPU_CHUNK_ELEMENTS
        size = max(64, elements // (max(self.input.shape[0], 1) * vectors))
        classes = self.centers.shape[0]
        return (slice(start, min(start + size, classes)) for start in range(0, classes, size))

    def forward(self, chunk: slice, need_slots: bool = True) -> Logits:
        return self._forward(self.centers[chunk], self.tau, need_slots)

    def backward(self, chunk: slice, grad: Tensor, output: Logits, needs: Needs) -> Gradients:
        return self._backward(grad, self.centers[chunk], self.tau, output, needs)

    def _forward(self, centers: Tensor, tau: Tensor, need_slots: bool) -> Logits:
        arguments = (self.input, centers, self.displacements, tau, self.allow_tf32, need_slots)
        with below_autocast():
            return Logits(*self.ops.logits_forward.default(*arguments))

    def _backward(
        self, grad: Tensor, centers: Tensor, tau: Tensor, output: Logits, needs: Needs
    ) -> Gradients:
        backward = self.ops.logits_backward.default
        # A gradient of tau in half precision would be rounded for each chunk.
        arguments = (self.input, centers, self.displacements, tau.to(self.dtype))
        with below_autocast():
            gradients = backward(grad, *arguments, *output, *needs, self.allow_tf32)
        return Gradients(*(g if needed else None for g, needed in zip(gradients, needs, strict=True)))


class SubcenterScorer(TranslationScorer):
    """Sub-centers [K, M, d]: a cosine classifier of K·M classes, and the maximum over every M."""

    def forward(self, chunk: slice, need_slots: bool = True) -> Logits:
        count = self.centers.shape[1]
        z, _, r, input_rnorms = self._forward(self.centers[chunk].flatten(0, 1), self.tau, need_slots=False)
        scores = z.unflatten(1, (-1, count))
        best, slots = first_slot(scores[:, :, 0], need_slots)
        for j in range(1, count):
            best, slots = running_max(scores[:, :, j], j, best, slots)
        return Logits(best, slots, r.unflatten(1, (-1, count))[0].T, input_rnorms)

    def backward(self, chunk: slice, grad: Tensor, output: Logits, needs: Needs) -> Gradients:
        centers = self.centers[chunk]
        z = output.logits[:, :, None].expand(-1, -1, centers.shape[1])
        scattered = torch.zeros_like(z, memory_format=torch.contiguous_format)
        scattered = scattered.scatter_(2, output.slots[:, :, None].long(), grad[:, :, None])
        flat = Logits(
            z.flatten(1),
            torch.zeros_like(scattered, dtype=torch.uint8).flatten(1),
            output.center_rnorms.T.reshape(1, -1),
            output.input_rnorms,
        )
        gradients = self._backward(scattered.flatten(1), centers.flatten(0, 1), self.tau, flat, needs)
        if gradients.centers is None:
            return gradients
        return gradients._replace(centers=gradients.centers.reshape(centers.shape))


@dataclass
class RotationScorer(TranslationScorer):
    """Centers [K, d] and rotations given by directions and turns: `rotation_forward` in csrc/schema.cpp."""

    directions: Tensor  # [M, d]
    turns: Tensor  # [3, M - 1]

    def forward(self, chunk: slice, need_slots: bool = True) -> Logits:
        unrotated = self._forward(self.centers[chunk], torch.ones_like(self.tau), need_slots=False)
        best, slots = first_slot(unrotated.logits, need_slots)
        for j, term in enumerate(self._terms(*self._coeffs(chunk)), 1):
            score = unrotated.logits + term * _inverse_norms(unrotated)
            best, slots = running_max(score, j, best, slots)
        rnorms = unrotated.center_rnorms.expand(len(self.directions), -1)
        return Logits(best * nonzero_tau(self.tau.to(best.dtype)), slots, rnorms, unrotated.input_rnorms)

    def backward(self, chunk: slice, grad: Tensor, output: Logits, needs: Needs) -> Gradients:
        tau = nonzero_tau(self.tau.to(grad.dtype))
        centers, one = self.centers[chunk], torch.ones_like(self.tau)
        unrotated = self._forward(centers, one, need_slots=True)
        weight = grad * tau * _inverse_norms(unrotated)
        x, y = self._coeffs(chunk)
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        moment = torch.zeros_like(weight)
        for j, term in enumerate(self._terms(x, y), 1):
            slot_weight = torch.where(output.slots == j, weight, 0)
            grad_x[:, 0] += (slot_weight * y[0, j - 1]).sum(1)
            grad_x[:, j] = (slot_weight * y[1, j - 1]).sum(1)
            grad_y[0, j - 1] = (slot_weight * x[:, :1]).sum(0)
            grad_y[1, j - 1] = (slot_weight * x[:, j : j + 1]).sum(0)
            moment += slot_weight * term
        gradients = self._backward(
            grad * tau, centers, one, unrotated, needs._replace(displacements=False, tau=False)
        )
        grad_input = _subtract_norm_term(gradients.input, self.input, moment.sum(1), unrotated.input_rnorms)
        grad_centers = _subtract_norm_term(
            gradients.centers, centers, moment.sum(0), unrotated.center_rnorms[0]
        )
        grad_dots, grad_turns = self._coeffs_backward(centers.to(x.dtype), grad_y)
        return Gradients(
            None if grad_input is None else grad_input + grad_x @ self.directions,
            None if grad_centers is None else grad_centers + grad_dots.T @ self.directions,
            torch.zeros_like(self.displacements) if needs.displacements else None,
            ((grad * output.logits).sum() / tau).reshape(self.tau.shape) if needs.tau else None,
            grad_x.T @ self.input.to(x.dtype) + grad_dots @ centers.to(x.dtype),
            grad_turns,
        )

    def _coeffs(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return f·u and f·p_j [B, M], and A and B [2, M - 1, k] of a chunk of k classes."""
        x = self.input.to(self.directions.dtype) @ self.directions.T
        return x, class_coeffs(self.directions, self.turns, self.centers[chunk].to(x.dtype))

    def _terms(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Yield what slot j adds to the product, from slot 1 on."""
        return (x[:, :1] * y[0, j - 1] + x[:, j : j + 1] * y[1, j - 1] for j in range(1, x.shape[1]))

    def _coeffs_backward(self, centers: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the dot products of directions and centers, [M, k], and of the turns."""
        along, across = center_dots(self.directions, centers)
        a, b, n = self.turns[:, :, None].unbind()
        grad_a, grad_b = grad_y.unbind()
        grad_along = (a * grad_a + n * grad_b).sum(0, keepdim=True)
        grad_turns = (grad_a * along, grad_b * across, grad_b * along - grad_a * across)
        return torch.cat([grad_along, b * grad_b - n * grad_a]), torch.stack(grad_turns).sum(2)


def make_scorer(ops: Any, a: Any) -> TranslationScorer:
    """Return the scorer for the record `a` of an op's arguments, over the kernels of a namespace."""
    displacements = getattr(a, "displacements", None)
    if displacements is None:
        displacements = a.input.new_empty(0, a.input.shape[1])
    arguments = (ops, a.input, a.centers, displacements, a.tau, a.allow_tf32)
    directions, turns = getattr(a, "directions", None), getattr(a, "turns", None)
    if directions is not None and turns is not None:
        dtype = compute_dtype(a.input, a.centers)
        return RotationScorer(*arguments, directions.to(dtype), turns.to(dtype))
    return SubcenterScorer(*arguments) if a.centers.dim() == 3 else TranslationScorer(*arguments)


class GradientAccumulator:
    """Gradients from chunks: those of centers are put together, the others are summed."""

    def __init__(self, scorer: TranslationScorer, needs: Needs) -> None:
        self.scorer = scorer
        arguments = {name: getattr(scorer, name, None) for name in Gradients._fields}
        self.needed = {
            name: x for name, x in arguments.items() if x is not None and getattr(needs, name, True)
        }
        self.sums: dict[str, Tensor] = {}

    def add(self, chunk: slice, gradients: Gradients) -> None:
        if chunk.stop - chunk.start == self.scorer.centers.shape[0]:  # the only chunk
            self.sums = {name: getattr(gradients, name) for name in self.needed}
            return
        self._begin()
        for name, total in self.sums.items():
            gradient = getattr(gradients, name)
            if name == "centers":
                total[chunk] = gradient
            else:
                total += gradient

    def _begin(self) -> None:
        if not self.sums:
            dtype = self.scorer.dtype
            self.sums = {
                name: torch.zeros_like(x, dtype=x.dtype if name == "centers" else dtype)
                for name, x in self.needed.items()
            }

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the fields of `Gradients` in their arguments' dtypes, an empty tensor where there is no gradient."""
        self._begin()  # there may have been no chunk
        scorer = self.scorer
        return tuple(
            self.sums[name].to(getattr(scorer, name).dtype)
            if name in self.sums
            else scorer.input.new_empty(0, dtype=scorer.dtype)
            for name in Gradients._fields
        )


def first_slot(scores: Tensor, need_slots: bool) -> tuple[Tensor, Tensor]:
    """Start a `running_max` with the scores of slot 0; without `need_slots` the slots are empty, [0]."""
    return scores, scores.new_zeros(scores.shape if need_slots else (0,), dtype=torch.uint8)


def running_max(scores: Tensor, slot: int, best: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Include the scores of one more slot in the maximum. The lowest of equal slots wins, and NaN is the largest."""
    wins = (scores > best) | (scores.isnan() & ~best.isnan())
    if slots.dim() > 1:
        slots = torch.where(wins, slot, slots)
    return torch.where(wins, scores, best), slots


def _inverse_norms(output: Logits) -> Tensor:
    return output.input_rnorms[:, None] * output.center_rnorms


def _subtract_norm_term(gradient: Tensor | None, x: Tensor, moment: Tensor, rnorm: Tensor) -> Tensor | None:
    """Subtract the gradient of the norm from the coefficients' terms; a norm that is clamped is constant."""
    if gradient is None:
        return None
    along = torch.where(rnorm >= 1e12, 0, moment * rnorm * rnorm)
    return gradient - along[:, None] * x
