"""The CPU time of one call. The tensors are so small that checks, dispatch, autograd and launches dominate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..baselines import linear
from ..conftest import Compare
from ..problem import Size, Tensors, make_tensors
from . import logits
from .losses import linear_loss, loss_step, ours, topk

Make = Callable[[Tensors], Callable[[], Any]]

TINY = Size(8, 16, 32)
#: Function -> our call, and the call that it is compared with.
FUNCTIONS: dict[str, tuple[Make, Make]] = {
    "logits": (lambda a: logits.forward(logits.ours, a), lambda a: logits.forward(linear, a)),
    "logits, step": (lambda a: logits.step(logits.ours, a), lambda a: logits.step(linear, a)),
    "loss, step": (lambda a: loss_step(ours, a), lambda a: loss_step(linear_loss, a)),
    "topk": (lambda a: topk("ours", a), lambda a: topk("linear", a)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_host_overhead(name: str, compare: Compare) -> None:
    arguments = make_tensors(TINY)
    title = f"Host overhead, {TINY}: time of a call, as a multiple of F.linear's (ms; n)"
    compare(title, name, "cpu", *(make(arguments) for make in FUNCTIONS[name]))
