"""Speed as ratios to `F.linear` with the same input and centres, the limit that no classifier head can beat by much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import Rows
from .forms import MAIN, NAMES, PASSES, Size, form, linear, ours, tensors

Paired = Callable[..., tuple[float, float, int]]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_forms(size: Size, name: str, kind: str, paired: Paired, rows: Rows) -> None:
    arguments = tensors(size)
    ratio, ms, n = paired(PASSES[kind](form(name), arguments), PASSES[kind](linear, arguments))
    title = f"Time of a {kind}, as a multiple of F.linear's (median of pairs; ms; n)"
    rows.add(title, name, str(size), f"{ratio:.2f} ({ms:.3g} ms; {n})")


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("m", [0, 2, 4, 8, 16])
def test_number_of_displacements(m: int, kind: str, paired: Paired, rows: Rows, size: Size) -> None:
    _only_at(MAIN, size)
    arguments = tensors(Size(size.B, size.K, size.d, m))
    ratio, ms, n = paired(PASSES[kind](ours, arguments), PASSES[kind](linear, arguments))
    rows.add(
        f"Displacements m, ours, {size}, multiples of F.linear",
        kind,
        f"m={m}",
        f"{ratio:.2f} ({ms:.3g} ms; {n})",
    )


@pytest.mark.parametrize("frozen", ["nothing", "displacements", "centers", "input"])
def test_frozen_arguments_skip_their_work(frozen: str, paired: Paired, rows: Rows, size: Size) -> None:
    """Against the same F.linear step with nothing frozen: what freezing saves."""
    _only_at(MAIN, size)
    full = tensors(size)
    names = ("input", "centers", "displacements", "tau")
    arguments = [t.detach() if name == frozen else t for name, t in zip(names, full, strict=True)]
    ratio, ms, n = paired(PASSES["step"](ours, arguments), PASSES["step"](linear, full))
    rows.add(
        f"Frozen arguments, ours, step, {size}, multiples of F.linear's whole step",
        "step",
        f"{frozen} frozen",
        f"{ratio:.2f} ({ms:.3g} ms; {n})",
    )


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, kind: str, paired: Paired, rows: Rows, size: Size) -> None:
    """Half-precision input and centres, against F.linear in float32: no slower."""
    _only_at(MAIN, size)
    run: Any = PASSES[kind](ours, tensors(size, dtype))
    ratio, ms, n = paired(run, PASSES[kind](linear, tensors(size)))
    title = f"Half precision, ours, {size}, multiples of F.linear in float32"
    rows.add(title, kind, str(dtype).removeprefix("torch."), f"{ratio:.2f} ({ms:.3g} ms; {n})")


def _only_at(size: Size, given: Size) -> None:
    if given != size:
        pytest.skip(f"measured at {size} alone")
