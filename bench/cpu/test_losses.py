"""Time of other losses and of top-k, as ratios to a plain linear softmax classifier: `F.linear`, then `F.cross_entropy`."""

from __future__ import annotations

import pytest

from ..conftest import Compare
from ..problem import FAIR, MAIN, Size, is_large, make_tensors
from .losses import LOSSES, TOP_K, loss_step, topk, why_not

#: Losses in addition to that of `test_classifier.py`.
NAMES = ("ours, m=0", "ours, bias and smoothing", "F.linear_cross_entropy")
TITLE = "Time of a loss and its backward, as a multiple of F.linear and F.cross_entropy's (ms; n)"


@pytest.mark.parametrize("name", NAMES)
def test_losses(size: Size, name: str, compare: Compare) -> None:
    _compare_losses(size, name, compare)


@pytest.mark.parametrize("name", ["ours", "F.linear_cross_entropy"])
def test_losses_where_chunking_pays(fair: Size, name: str, compare: Compare) -> None:
    _compare_losses(fair, name, compare)


@pytest.mark.parametrize("name", ["ours", "ours, with probabilities"])
def test_topk(size: Size, name: str, compare: Compare) -> None:
    arguments = make_tensors(size)
    title = f"Time of the top {TOP_K} classes, as a multiple of F.linear and topk's (ms; n)"
    compare(title, name, size, topk(name, arguments), topk("linear", arguments))


@pytest.mark.parametrize("k", [1, 100])
def test_topk_against_logits(size: Size, k: int, compare: Compare) -> None:
    if k > size.K:
        pytest.skip(f"K is {size.K}")
    arguments = make_tensors(size)
    title = "Time of the top k classes, as a multiple of our logits' and torch.topk's (ms; n)"
    compare(title, f"k={k}", size, topk("ours", arguments, k), topk("our logits, then topk", arguments, k))


def _compare_losses(size: Size, name: str, compare: Compare) -> None:
    if reason := why_not(name):
        pytest.skip(reason)
    if name == "F.linear_cross_entropy" and is_large(size) and size != FAIR:
        pytest.skip(f"timed at sizes up to {MAIN} and at {FAIR}: a call takes ten seconds and more at {size}")
    arguments = make_tensors(size)
    run, baseline = (loss_step(LOSSES[each], arguments) for each in (name, "linear"))
    if name == "F.linear_cross_entropy":
        loss_step(LOSSES[name], make_tensors(Size(2, 3, 4)))()  # its first call imports modules
    compare(TITLE, name, size, run, baseline)
