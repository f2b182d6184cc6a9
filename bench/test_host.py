"""The cost of a call to the host: on tensors so small that checks, dispatch, autograd and launches are all there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import forms
from .conftest import Rows
from .forms import Size, Tensors, tensors
from .losses import loss_step, topk

Paired = Callable[..., tuple[float, float, int]]
Make = Callable[[Tensors], Callable[[], Any]]

TINY = Size(8, 16, 32)
#: Operator -> ours, and what it is compared with.
OPERATORS: dict[str, tuple[Make, Make]] = {
    "logits": (lambda a: forms.forward(forms.ours, a), lambda a: forms.forward(forms.linear, a)),
    "logits, step": (lambda a: forms.step(forms.ours, a), lambda a: forms.step(forms.linear, a)),
    "loss, step": (
        lambda a: loss_step("ours", a),
        lambda a: loss_step("linear", a),
    ),
    "topk": (lambda a: topk("ours", a), lambda a: topk("linear", a)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_host_overhead(name: str, paired: Paired, rows: Rows) -> None:
    arguments = tensors(TINY)
    ours, linear = (make(arguments) for make in OPERATORS[name])
    ratio, ms, n = paired(ours, linear)
    title = f"Host overhead, {TINY}: µs a call, and as a multiple of F.linear's (n)"
    rows.add(title, name, "cpu", f"{1e3 * ms:.0f} µs ({ratio:.1f}; {n})")
