"""Peak memory of each form in a process of its own, as a multiple of the logits' own size, B·K·4 bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Rows
from .forms import NAMES, PASSES, Size


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", NAMES)
def test_peak(size: Size, name: str, kind: str, rows: Rows) -> None:
    command = [sys.executable, "-m", "bench.memory", name, kind, f"{size.B}x{size.K}x{size.d}x{size.m}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout)
    title = f"Peak memory of a {kind} beyond its arguments, as a multiple of the logits' size"
    rows.add(title, name, str(size), f"{peak / (4 * size.B * size.K):.2f} ({peak / 2**20:.0f} MiB)")
