"""Time of losses and top-k, as ratios to a plain linear softmax classifier: `F.linear`, then `F.cross_entropy`."""

from __future__ import annotations

import pytest

from ..conftest import Paired, Tables
from ..problem import MAIN, Size, make_tensors
from .losses import LOSSES, TOP_K, TOPK, loss_step, subcenter_step, topk, why_not


@pytest.mark.parametrize("name", list(LOSSES)[1:])
def test_losses(size: Size, name: str, paired: Paired, tables: Tables) -> None:
    if reason := why_not(name):
        pytest.skip(reason)
    arguments = make_tensors(size)
    ratio, ms, n = paired(loss_step(name, arguments), loss_step("linear", arguments))
    title = "Time of a loss and its backward, as a multiple of F.linear and F.cross_entropy's (ms; n)"
    tables.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("num_subcenters", [2, 3, 5])
def test_subcenters(num_subcenters: int, size: Size, paired: Paired, tables: Tables) -> None:
    if size != MAIN:
        pytest.skip(f"measured at {MAIN} alone")
    arguments = make_tensors(size)
    ratio, ms, n = paired(subcenter_step(arguments, num_subcenters), loss_step("linear", arguments))
    title = f"Sub-centers, loss and backward, {size}, as a multiple of F.linear and F.cross_entropy's (ms; n)"
    tables.add(title, "ours", f"M={num_subcenters}", f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("name", list(TOPK)[1:])
def test_topk(size: Size, name: str, paired: Paired, tables: Tables) -> None:
    arguments = make_tensors(size)
    ratio, ms, n = paired(topk(name, arguments), topk("linear", arguments))
    title = f"Time of the top {TOP_K} classes, as a multiple of F.linear and topk's (ms; n)"
    tables.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("k", [1, 10, 100])
def test_topk_against_logits(size: Size, k: int, paired: Paired, tables: Tables) -> None:
    if k > size.K:
        pytest.skip(f"K is {size.K}")
    arguments = make_tensors(size)
    ratio, ms, n = paired(topk("ours", arguments, k), topk("our logits, then topk", arguments, k))
    title = "Time of the top k classes, as a multiple of our logits' and torch.topk's (ms; n)"
    tables.add(title, f"k={k}", str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")
