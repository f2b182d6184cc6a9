"""Time of other forms of the logits, and of the classifier in special cases, as ratios to `F.linear`."""

from __future__ import annotations

import pytest
import torch

from ..baselines import linear
from ..conftest import Compare
from ..problem import MAIN, Size, is_large, make_tensors
from .logits import NAMES, PASSES, implementation, ours

#: The forms that are timed. `test_classifier.py` times ours; eager "split" is slower than compiled.
TIMED = tuple(name for name in NAMES if name not in ("linear", "ours", "split"))


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", TIMED)
def test_other_forms(size: Size, name: str, kind: str, compare: Compare) -> None:
    if is_large(size) and (name.endswith(" compiled") or kind == "step"):
        pytest.skip(f"timed at sizes up to {MAIN}: a compilation and a step take half a minute at {size}")
    arguments = make_tensors(size)
    run, baseline = (PASSES[kind](function, arguments) for function in (implementation(name), linear))
    if name.endswith(" compiled"):
        run()  # the first call compiles
    title = f"Time of a {kind} in plain PyTorch, as a multiple of F.linear's (ms; n)"
    compare(title, name, size, run, baseline)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("m", [0, 2, 8, 16])
def test_number_of_displacements(m: int, kind: str, main: Size, compare: Compare) -> None:
    arguments = make_tensors(Size(main.B, main.K, main.d, m))
    title = f"Displacements m, ours, {main}, multiples of F.linear (ms; n)"
    compare(title, kind, f"m={m}", *(PASSES[kind](function, arguments) for function in (ours, linear)))


@pytest.mark.parametrize("frozen", ["nothing", "displacements", "centers", "input"])
def test_frozen_arguments_skip_their_work(frozen: str, main: Size, compare: Compare) -> None:
    """The step of F.linear has nothing frozen, so that the ratios differ by the work that freezing saves."""
    x, w, delta, tau = full = make_tensors(main)
    arguments = (
        x.detach() if frozen == "input" else x,
        w.detach() if frozen == "centers" else w,
        delta.detach() if frozen == "displacements" else delta,
        tau,
    )
    title = f"Frozen arguments, ours, step, {main}, multiples of F.linear's whole step (ms; n)"
    compare(title, "step", f"{frozen} frozen", PASSES["step"](ours, arguments), PASSES["step"](linear, full))


@pytest.mark.parametrize("kind", PASSES)
def test_float16(kind: str, main: Size, compare: Compare) -> None:
    """The baseline is in float32. Without float16 instructions, F.linear in float16 takes half a minute per step."""
    run = PASSES[kind](ours, make_tensors(main, torch.float16))
    title = f"Input and centers in float16, ours, {main}, multiples of F.linear in float32 (ms; n)"
    compare(title, kind, "float16", run, PASSES[kind](linear, make_tensors(main)))
