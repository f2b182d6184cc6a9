"""Peak memory of each implementation in a new process, as a multiple of the logits' size, B·K·4 bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..problem import Size
from .logits import NAMES, PASSES
from .losses import LOSSES, TOP_K, TOPK, why_not
from .memory import peak_in_new_process
from .report import Tables

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@needs_proc
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", NAMES)
def test_peak(size: Size, name: str, kind: str, tables: Tables) -> None:
    added = peak_in_new_process(name, kind, size)
    title = f"Peak memory of a {kind} beyond its arguments, as a multiple of the logits' size"
    tables.add(title, name, str(size), f"{added / (4 * size.B * size.K):.2f} ({added / 2**20:.0f} MiB)")


@needs_proc
@pytest.mark.parametrize("name", LOSSES)
def test_peak_of_a_loss(size: Size, name: str, tables: Tables) -> None:
    if reason := why_not(name):
        pytest.skip(reason)
    gradients = 4 * (size.d * (size.B + size.K + size.m) + 1)
    added = peak_in_new_process(name, "loss", size) - gradients
    title = "Peak memory of a loss and its backward beyond arguments and gradients, in % of the logits' size"
    tables.add(title, name, str(size), f"{added / (4 * size.B * size.K):.1%} ({added / 2**20:.0f} MiB)")


@needs_proc
@pytest.mark.parametrize("name", TOPK)
def test_peak_of_topk(size: Size, name: str, tables: Tables) -> None:
    added = peak_in_new_process(name, "topk", size)
    title = f"Peak memory of the top {TOP_K} classes beyond the arguments, in % of the logits' size"
    tables.add(title, name, str(size), f"{added / (4 * size.B * size.K):.1%} ({added / 2**20:.0f} MiB)")
