"""Samples of sub-centers and rotations without near-ties between slots, and their loss by the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gistops._classifier import Classifier, LossOptions, no_displacements
from gistops.backends import reference

f32, f64 = torch.float32, torch.float64


class VectorSample(NamedTuple):
    """Sizes of a call with M sub-centers per class, or M - 1 rotations; the dtype of input and centers."""

    form: str  # "subcenters" or "rotation"
    B: int
    K: int
    M: int
    d: int
    dtype: torch.dtype = f32

    @property
    def id(self) -> str:
        return f"{self.form}-{self.B}x{self.K}x{self.M}x{self.d}-{str(self.dtype).removeprefix('torch.')}"

    def tensors(self, seed: int) -> list[Tensor]:
        """Return input, centers, tau, and for rotations displacements and axis, without near-ties between slots.

        So all backends and chunks choose the same slots.
        """
        for attempt in range(1000):
            source = torch.Generator().manual_seed(seed + attempt)
            wide = f64 if self.dtype == f64 else f32

            def normal(*sizes: int, source: torch.Generator = source) -> Tensor:
                return torch.randn(*sizes, generator=source)

            tau = (torch.rand((), generator=source) * 20 + 4).to(wide)
            if self.form == "subcenters":
                tensors = [
                    normal(self.B, self.d).to(self.dtype),
                    normal(self.K, self.M, self.d).to(self.dtype),
                    tau,
                ]
            else:
                vectors = [normal(self.B, self.d), normal(self.K, self.d)]
                turns = [normal(self.M - 1, self.d), normal(self.d)]
                tensors = [*(v.to(self.dtype) for v in vectors), tau, *(v.to(wide) for v in turns)]
            if self.M == 1 or self.gap(tensors) > 2e-6:
                return [t.requires_grad_() for t in tensors]
        raise AssertionError("expected a sample without near-ties among 1000")

    def gap(self, tensors: list[Tensor]) -> float:
        """Return the smallest difference between the best two cosines of a pair."""
        x, centers, _, *turns = (t.double() for t in tensors)
        if turns:
            displacements, axis = turns
            matrices = [reference.rotation(axis, delta) for delta in displacements]
            centers = torch.stack([centers, *(centers + centers @ turn.T for turn in matrices)], 1)
        cosines = torch.einsum("bd,kmd->bkm", F.normalize(x), F.normalize(centers, dim=2))
        return float((-cosines.topk(2, dim=2).values.diff(dim=2)).min())


def by_definition(
    tensors: list[Tensor], target: Tensor, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return loss, lse and the leaves by the reference in a dtype, with bias and margin among the leaves."""
    x, w, tau, *turns = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    vectors = {name: options.get(name) for name in ("class_bias", "weight", "margin")}
    wide = {name: None if v is None else v.to(dtype) for name, v in vectors.items()}
    learned = [v.requires_grad_() for name, v in wide.items() if v is not None and name != "weight"]
    if turns:
        classifier = Classifier(w, turns[0], tau, "rotation", turns[1])
    else:
        classifier = Classifier(w, no_displacements(x), tau, "subcenters")
    loss, lse = reference.cross_entropy(x, classifier, target, LossOptions(**options | wide))
    return loss, lse, [*leaves, *learned]
