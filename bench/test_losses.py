"""Loss and best classes as ratios to a plain linear softmax classifier's, `F.linear` and then `F.cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Rows
from .forms import MAIN, Size, tensors
from .losses import BEST, LOSSES, TOPK, free_step, loss_step, topk, why_not

Paired = Callable[..., tuple[float, float, int]]


@pytest.mark.parametrize("name", list(LOSSES)[1:])
def test_losses(size: Size, name: str, paired: Paired, rows: Rows) -> None:
    if reason := why_not(name):
        pytest.skip(reason)
    arguments = tensors(size)
    ratio, ms, n = paired(loss_step(name, arguments), loss_step("linear", arguments))
    title = "Time of a loss and its backward, as a multiple of F.linear and F.cross_entropy's (ms; n)"
    rows.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("vectors", [2, 3, 5])
def test_free_centres(vectors: int, size: Size, paired: Paired, rows: Rows) -> None:
    if size != MAIN:
        pytest.skip(f"measured at {MAIN} alone")
    arguments = tensors(size)
    ratio, ms, n = paired(free_step(arguments, vectors), loss_step("linear", arguments))
    title = f"Free centres, loss and backward, {size}, multiples of F.linear and F.cross_entropy's"
    rows.add(title, "ours", f"M={vectors}", f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("name", list(TOPK)[1:])
def test_best_classes(size: Size, name: str, paired: Paired, rows: Rows) -> None:
    arguments = tensors(size)
    ratio, ms, n = paired(topk(name, arguments), topk("linear", arguments))
    title = f"Time of the best {BEST} classes, as a multiple of F.linear and topk's (ms; n)"
    rows.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")
