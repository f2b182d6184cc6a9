"""Time of classifiers whose classes have other vectors than a center and shared displacements."""

from __future__ import annotations

import pytest
import torch

from ..baselines import linear
from ..conftest import Compare
from ..problem import Size, make_tensors
from . import logits, losses

#: Centers of a class that are learned independently of each other, as in sub-center ArcFace.
SUBCENTERS = 5
PASSES = {"forward": logits.forward, "loss and backward": losses.loss_step}


@pytest.mark.parametrize("kind", PASSES)
def test_rotations(size: Size, kind: str, compare: Compare) -> None:
    arguments = make_tensors(size)
    module = losses if kind == "loss and backward" else logits
    run, baseline = (PASSES[kind](function, arguments) for function in (module.rotation, module.ours))
    compare("Time of rotations, as a multiple of translations' (ms; n)", kind, size, run, baseline)


@pytest.mark.parametrize("kind", PASSES)
def test_subcenters(size: Size, kind: str, compare: Compare) -> None:
    """M sub-centers per class are compared with M calls of the baseline, a linear classifier."""
    x, _, delta, tau = arguments = make_tensors(size)
    centers = torch.randn(size.K, SUBCENTERS, size.d).requires_grad_()
    module = losses if kind == "loss and backward" else logits
    run = PASSES[kind](module.subcenters, (x, centers, delta, tau))
    baseline = PASSES[kind](losses.linear_loss if module is losses else linear, arguments)
    title = f"Time of M = {SUBCENTERS} sub-centers, as a multiple of M calls of F.linear (and F.cross_entropy; ms; n)"
    compare(title, kind, size, run, baseline, times=SUBCENTERS)
