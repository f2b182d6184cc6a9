"""Time of the logits, as ratios to `F.linear` with the same input and centers: hardly any classifier head is faster."""

from __future__ import annotations

import pytest
import torch

from ..baselines import linear
from ..conftest import Paired, Tables
from ..problem import MAIN, Size, make_tensors
from .logits import NAMES, PASSES, implementation, ours


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_implementations(size: Size, name: str, kind: str, paired: Paired, tables: Tables) -> None:
    arguments = make_tensors(size)
    ratio, ms, n = paired(PASSES[kind](implementation(name), arguments), PASSES[kind](linear, arguments))
    title = f"Time of a {kind}, as a multiple of F.linear's (median of pairs; ms; n)"
    tables.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("m", [0, 2, 4, 8, 16])
def test_number_of_displacements(m: int, kind: str, paired: Paired, tables: Tables, size: Size) -> None:
    _only_at_main(size)
    arguments = make_tensors(Size(size.B, size.K, size.d, m))
    ratio, ms, n = paired(PASSES[kind](ours, arguments), PASSES[kind](linear, arguments))
    title = f"Displacements m, ours, {size}, multiples of F.linear"
    tables.add(title, kind, f"m={m}", f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("frozen", ["nothing", "displacements", "centers", "input"])
def test_frozen_arguments_skip_their_work(frozen: str, paired: Paired, tables: Tables, size: Size) -> None:
    """The step of F.linear has nothing frozen, so that the ratios differ by the work that freezing saves."""
    _only_at_main(size)
    x, w, delta, tau = full = make_tensors(size)
    arguments = (
        x.detach() if frozen == "input" else x,
        w.detach() if frozen == "centers" else w,
        delta.detach() if frozen == "displacements" else delta,
        tau,
    )
    ratio, ms, n = paired(PASSES["step"](ours, arguments), PASSES["step"](linear, full))
    title = f"Frozen arguments, ours, step, {size}, multiples of F.linear's whole step"
    tables.add(title, "step", f"{frozen} frozen", f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, kind: str, paired: Paired, tables: Tables, size: Size) -> None:
    """Input and centers in half precision are compared with F.linear in float32."""
    _only_at_main(size)
    run = PASSES[kind](ours, make_tensors(size, dtype))
    ratio, ms, n = paired(run, PASSES[kind](linear, make_tensors(size)))
    title = f"Half precision, ours, {size}, multiples of F.linear in float32"
    tables.add(title, kind, str(dtype).removeprefix("torch."), f"{ratio:.2f} ({ms:.3g} ms; {n})")


def _only_at_main(size: Size) -> None:
    if size != MAIN:
        pytest.skip(f"measured at {MAIN} alone")
