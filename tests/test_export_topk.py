"""Tests of the decomposition of `topk`, which needs no compiled op."""

from __future__ import annotations

import torch

from gistops.backends import reference
from gistops.backends.plain import PlainOps
from gistops.nn import ConstellationClassifier, SubcenterClassifier


def test_the_decomposition_of_topk_is_the_reference(seed: int) -> None:
    """In float64, in which no two slots or classes are equal up to rounding."""
    f64 = torch.float64
    x, bias = torch.randn(9, 24, dtype=f64), torch.randn(53, dtype=f64)
    for head in (ConstellationClassifier(24, 53, dtype=f64), SubcenterClassifier(24, 53, dtype=f64)):
        classifier = head._classifier()
        centers, displacements, tau = (t.detach() for t in classifier[:3])
        arguments = (x, centers, displacements, tau, bias, None, None, 5, True)
        ours = PlainOps.topk.default(*arguments)
        for value, expected in zip(ours, reference.topk(x, classifier, bias, 5), strict=True):
            torch.testing.assert_close(value, expected.detach())
