"""Time of the classifier in float32, bfloat16 and under autocast: the rows of the first table of docs/performance.md, and small batches.

The baseline has the same precision. Its cross-entropy is in the dtype in which `F.linear` returns the logits.
"""

from __future__ import annotations

import pytest

from gistops.nn import ConstellationClassifier

from ..baselines import linear
from ..conftest import Compare
from ..problem import Size
from . import logits, losses
from .precisions import PRECISIONS, in_precision, tensors
from .report import GLANCE

#: Pass -> how it is made of a function, ours, and the baseline.
PASSES = {
    "forward": (logits.forward, logits.ours, linear),
    "forward and backward": (logits.step, logits.ours, linear),
    "loss and backward": (losses.loss_step, losses.ours, losses.linear_loss),
}
ROWS = [(kind, precision) for kind in PASSES for precision in PRECISIONS if kind != "forward and backward"]
ROWS.insert(len(PRECISIONS), ("forward and backward", "float32"))


@pytest.mark.parametrize(("kind", "precision"), ROWS)
def test_classifier(size: Size, kind: str, precision: str, compare: Compare) -> None:
    make, *functions = PASSES[kind]
    arguments = tensors(size, precision)
    calls = (make(in_precision(function, precision), arguments) for function in functions)
    compare(GLANCE, f"{kind}, {precision}", size, *calls)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen"])
@pytest.mark.parametrize("batch", [1, 32])
def test_inference(batch: int, frozen: bool, precision: str, main: Size, compare: Compare) -> None:
    size = Size(batch, main.K, main.d, main.m)
    arguments = tensors(size, precision)
    head = ConstellationClassifier(size.d, size.K, size.m, backend="cpu").to(arguments[0].dtype)
    module = head.freeze() if frozen else head
    ours = in_precision(lambda x, w, delta, tau: module(x), precision)
    calls = (logits.forward(function, arguments) for function in (ours, in_precision(linear, precision)))
    title = "Logits of small batches, as a multiple of F.linear's time in the same precision (ms; n)"
    compare(title, f"{'frozen head' if frozen else 'head'}, {precision}", size, *calls)
