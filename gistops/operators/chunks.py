"""Chunks of classes through a family's kernels for logits: shared displacements, free centres, tables.

Each class here knows the arguments of one call. `forward(part)` gives what `logits.FORWARD_SCHEMA` says of the classes
in a slice; `backward(part, grad, made)` their gradients, of a chunk of centres and class tables alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import below_autocast, compute_dtype

#: Scores in a chunk, at most: 128 MiB in float32, so that 256 features and 100,000 classes are one chunk. What is made of
#: them takes half a GiB at most. Elsewhere than on a GPU, where caches are small and launches cost nothing, 16 MiB.
CHUNK_ELEMENTS = 1 << 25
CPU_CHUNK_ELEMENTS = 1 << 22
Made = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, slots, center_rnorms, input_rnorms


class Needs(NamedTuple):
    """The gradients that are asked for."""

    input: bool
    centers: bool
    displacements: bool
    tau: bool


class Gradients(NamedTuple):
    """Of the arguments; None where not asked for. Those of centres and class tables are of the chunk."""

    input: Tensor | None
    centers: Tensor | None
    displacements: Tensor | None
    tau: Tensor | None
    feature_table: Tensor | None = None
    class_tables: Tensor | None = None


@dataclass
class Shared:
    """Centres [K, d] and displacements [m, d]."""

    family: str
    input: Tensor
    centers: Tensor
    displacements: Tensor
    tau: Tensor
    allow_tf32: bool

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.input, self.centers, self.displacements)

    def parts(self) -> Iterator[slice]:
        """The chunks."""
        vectors = self.centers.shape[1] if self.centers.dim() == 3 else 1
        elements = CHUNK_ELEMENTS if self.input.device.type == "cuda" else CPU_CHUNK_ELEMENTS
        size = max(64, elements // (max(self.input.shape[0], 1) * vectors))
        classes = self.centers.shape[0]
        return (slice(start, min(start + size, classes)) for start in range(0, classes, size))

    def forward(self, part: slice) -> Made:
        return self._forward(self.centers[part], self.tau)

    def backward(self, part: slice, grad: Tensor, made: Made, needs: Needs) -> Gradients:
        return self._backward(grad, self.centers[part], self.tau, made, needs)

    def _forward(self, centers: Tensor, tau: Tensor) -> Made:
        operator = getattr(torch.ops.gistops, f"{self.family}_forward").default
        with below_autocast():
            made: Made = operator(self.input, centers, self.displacements, tau, self.allow_tf32)
        return made

    def _backward(self, grad: Tensor, centers: Tensor, tau: Tensor, made: Made, needs: Needs) -> Gradients:
        operator = getattr(torch.ops.gistops, f"{self.family}_backward").default
        arguments = (self.input, centers, self.displacements, tau)
        with below_autocast():
            gradients = operator(grad, *arguments, *made, *needs, self.allow_tf32)
        return Gradients(*(g if needed else None for g, needed in zip(gradients, needs, strict=True)))


class Free(Shared):
    """Centres [K, M, d]: a cosine classifier of K·M classes, and the best of every M."""

    def forward(self, part: slice) -> Made:
        count = self.centers.shape[1]
        z, _, r, input_rnorms = self._forward(self.centers[part].flatten(0, 1), self.tau)
        scores = z.unflatten(1, (-1, count))
        best, slot = scores[:, :, 0], torch.zeros_like(scores[:, :, 0], dtype=torch.uint8)
        for j in range(1, count):
            best, slot = _better(scores[:, :, j], j, best, slot)
        return best, slot, r.unflatten(1, (-1, count))[0].T, input_rnorms

    def backward(self, part: slice, grad: Tensor, made: Made, needs: Needs) -> Gradients:
        logits, slots, rnorms, input_rnorms = made
        centers = self.centers[part]
        z = logits[:, :, None].expand(-1, -1, centers.shape[1])
        routed = torch.zeros_like(z, memory_format=torch.contiguous_format)
        routed = routed.scatter_(2, slots[:, :, None].long(), grad[:, :, None])
        flat = (
            z.flatten(1),
            torch.zeros_like(routed, dtype=torch.uint8).flatten(1),
            rnorms.T.reshape(1, -1),
            input_rnorms,
        )
        gradients = self._backward(routed.flatten(1), centers.flatten(0, 1), self.tau, flat, needs)
        if gradients.centers is None:
            return gradients
        return gradients._replace(centers=gradients.centers.reshape(centers.shape))


@dataclass
class Tabled(Shared):
    """Centres [K, d], and vectors by tables: `tabled_forward` in csrc/schema.cpp."""

    feature_table: Tensor  # [B, M]
    class_tables: Tensor  # [2, M, K]

    def forward(self, part: slice) -> Made:
        made = self._forward(self.centers[part], torch.ones_like(self.tau))
        best, slot = made[0], torch.zeros_like(made[0], dtype=torch.uint8)
        for j in range(1, self.feature_table.shape[1]):
            best, slot = _better(made[0] + self._term(part, j) * self._scale(made), j, best, slot)
        rnorms = made[2].expand(self.feature_table.shape[1], -1)
        return best * self.tau.to(best.dtype), slot, rnorms, made[3]

    def backward(self, part: slice, grad: Tensor, made: Made, needs: Needs) -> Gradients:
        logits, slots = made[:2]
        tau = self.tau.to(grad.dtype)
        centers, one = self.centers[part], torch.ones_like(self.tau)
        plain = self._forward(centers, one)
        weight = grad * tau * self._scale(plain)
        x, y = self.feature_table, self.class_tables[:, :, part]
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
        moment = torch.zeros_like(weight)
        for j in range(1, x.shape[1]):
            here = torch.where(slots == j, weight, 0)
            of_x[:, 0] += (here * y[0, j]).sum(1)
            of_x[:, j] = (here * y[1, j]).sum(1)
            of_y[0, j] = (here * x[:, :1]).sum(0)
            of_y[1, j] = (here * x[:, j : j + 1]).sum(0)
            moment += here * self._term(part, j)
        gradients = self._backward(
            grad * tau, centers, one, plain, needs._replace(displacements=False, tau=False)
        )
        # What the norms take away of the tables' terms; a clamped norm is constant.
        return Gradients(
            _without(gradients.input, self.input, moment.sum(1), plain[3]),
            _without(gradients.centers, centers, moment.sum(0), plain[2][0]),
            torch.zeros_like(self.displacements) if needs.displacements else None,
            ((grad * logits).sum() / tau).reshape(self.tau.shape) if needs.tau else None,
            of_x,
            of_y,
        )

    def _scale(self, made: Made) -> Tensor:
        return made[3][:, None] * made[2]

    def _term(self, part: slice, j: int) -> Tensor:
        x, y = self.feature_table, self.class_tables
        return x[:, :1] * y[0, j, part] + x[:, j : j + 1] * y[1, j, part]


def scorer(
    family: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    feature_table: Tensor | None,
    class_tables: Tensor | None,
    allow_tf32: bool,
) -> Shared:
    """What serves these arguments."""
    arguments = (family, input, centers, displacements, tau, allow_tf32)
    if feature_table is not None and class_tables is not None:
        dtype = compute_dtype(input, centers)
        return Tabled(*arguments, feature_table.to(dtype), class_tables.to(dtype))
    return Free(*arguments) if centers.dim() == 3 else Shared(*arguments)


class Sums:
    """Gradients that come in chunks: of centres and class tables put together, of all else summed."""

    def __init__(self, arguments: Shared, needs: Needs) -> None:
        self.arguments = arguments
        made = {name: getattr(arguments, name, None) for name in Gradients._fields}
        self.wanted = {name: x for name, x in made.items() if x is not None and getattr(needs, name, True)}
        self.sums: dict[str, Tensor] = {}

    def add(self, part: slice, gradients: Gradients) -> None:
        if part.stop - part.start == self.arguments.centers.shape[0]:  # the only chunk
            self.sums = {name: getattr(gradients, name) for name in self.wanted}
            return
        self._begin()
        for name, total in self.sums.items():
            gradient = getattr(gradients, name)
            if name == "centers":
                total[part] = gradient
            elif name == "class_tables":
                total[:, :, part] = gradient
            else:
                total += gradient

    def _begin(self) -> None:
        if not self.sums:
            dtype = self.arguments.dtype
            self.sums = {
                name: torch.zeros_like(x, dtype=x.dtype if name == "centers" else dtype)
                for name, x in self.wanted.items()
            }

    def gradients(self) -> tuple[Tensor, ...]:
        """All six, in their arguments' dtypes; an empty tensor for each that is not there."""
        self._begin()  # there may have been no chunk
        a = self.arguments
        return tuple(
            self.sums[name].to(getattr(a, name).dtype)
            if name in self.sums
            else a.input.new_empty(0, dtype=a.dtype)
            for name in Gradients._fields
        )


def _better(score: Tensor, j: int, best: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    wins = (score > best) | (score.isnan() & ~best.isnan())
    return torch.where(wins, score, best), torch.where(wins, j, slot)


def _without(gradient: Tensor | None, x: Tensor, moment: Tensor, rnorm: Tensor) -> Tensor | None:
    if gradient is None:
        return None
    along = torch.where(rnorm >= 1e12, 0, moment * rnorm * rnorm)
    return gradient - along[:, None] * x
