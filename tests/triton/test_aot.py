"""The shipped configurations, compiled ahead of time: no spilled registers, and shared memory that fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

from gistops.backends.triton import configs, tile_tables  # noqa: E402

from . import aot  # noqa: E402
from .compilation import SHARED  # noqa: E402

#: Maximum of spilled bytes, or registers. Compilers spill a value or two in branches that are almost never taken; a tile
#: that does not fit spills hundreds. The matrix product kernels spill nothing on Hopper, with Triton 3.6 to 3.9.
SPILLED = 64
LARGE = ("forward_kernel", "grad_centers_kernel", "topk_partials_kernel")


def spilled_at_most(case: aot.Case) -> int:
    large = case.name in LARGE and case.dtype in ("bf16", "f16", "tf32")
    return 0 if large and case.target == "sm_90" else SPILLED


EVERY = [case for target in aot.TARGETS for dtype in aot.DTYPES for case in aot.cases(target, dtype)]


def in_default_run(case: aot.Case) -> bool:
    """Return true for bfloat16 on Hopper, and for the matrix product kernels elsewhere: a fifth of all, in 20 seconds."""
    if case.name == "topk_partials_kernel" and not case.constants["HAS_BIAS"]:
        return False
    if case.dtype == "bf16" and case.target == "sm_90":
        return True
    fullest = case.name == "forward_kernel" or (
        case.constants.get("NEED_CENTERS") and case.constants.get("NEED_DISPLACEMENTS")
    )
    large = case.name in ("forward_kernel", "grad_centers_kernel")
    return bool(large and fullest and case.dtype in ("bf16", "tf32"))


DEFAULT = [case for case in EVERY if in_default_run(case)]
OTHERS = [case for case in EVERY if not in_default_run(case)]


def check(case: aot.Case) -> None:
    report = aot.compile_case(case)
    allowed = spilled_at_most(case)
    assert report.spilled <= allowed, f"{report.spilled} spilled, {report.registers} registers"
    assert report.shared <= SHARED[case.target], f"{report.shared} bytes of shared memory"
    multiplies = case.name in ("forward_kernel", "topk_partials_kernel") or case.constants.get("NEED_CENTERS")
    if multiplies and case.dtype in ("bf16", "f16", "tf32"):
        assert {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[case.target] in report.assembly


@pytest.mark.parametrize("case", DEFAULT, ids=lambda case: case.id)
def test_fits(case: aot.Case) -> None:
    check(case)


@pytest.mark.compile
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.id)
def test_the_others_fit(case: aot.Case) -> None:
    check(case)


ONES = {(c.name, c.constants.get("BLOCK_S")): c for c in EVERY if (c.dtype, c.target) == ("bf16", "sm_90")}


@pytest.mark.parametrize("case", ONES.values(), ids=lambda case: case.id)
def test_sizes_of_one_compile(case: aot.Case) -> None:
    """Triton turns arguments that are 1 into constants, and compiles other code for them. The interpreter does not."""
    aot.compile_case(case, ones=True)


def test_launches_bind_their_arguments() -> None:
    command = [sys.executable, "-m", "tests.triton.launch"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    launched = [line.split()[0] for line in lines]
    assert len(launched) == 249, launched
    assert set(launched) == {case.name for case in EVERY}
    assert "rescore_cancelled_kernel 32" in lines, "256 x 1000: one program per 32 classes, whatever the rows"


def test_the_table_has_one_line_per_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_case", lambda case: aot.Report(1, 2, 3, "wgmma"))
    lines = list(aot.table())
    assert len(lines) == len(EVERY) + 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_kinds_of_products() -> None:
    assert configs.kind(torch.float32, allow_tf32=False) == "ieee"
    assert configs.kind(torch.float32, allow_tf32=True) == "tf32"
    assert configs.kind(torch.bfloat16, True) == configs.kind(torch.float16, False) == "half"
    assert configs.kind(torch.float64, True) == "f64"


def test_the_table_of_choices() -> None:
    """Every entry names its source; an entry for a target comes before one for all targets."""
    for entry in tile_tables.CHOICES.values():
        assert entry.source.split(":")[0] in ("measured", "compiled", "predicted")
    assert tile_tables.choice("centers_product", "hopper", "tf32") == "fused"
    assert tile_tables.choice("centers_product", "amd", "half") == "cublas"
    assert tile_tables.tile_sizes("ampere", "f64").lse == (16, 32, 4)
    with pytest.raises(KeyError):
        tile_tables.choice("topk", "hopper", "f64")


@pytest.mark.parametrize(
    ("B", "K", "expected"),
    [
        (4096, 100_000, (128, 128)),  # enough of everything: the largest
        (256, 8142, (128, 128)),  # 128 programs for 132 multiprocessors: nine tenths are enough
        (256, 7000, (64, 128)),  # 110 programs of the largest would leave a sixth idle
        (64, 100_000, (128, 64)),  # no tile wider than the rows
        (32, 1000, (64, 64)),  # too small to fill the device: as many programs as there can be
    ],
)
def test_the_largest_tile_that_fills_the_device(B: int, K: int, expected: tuple[int, int]) -> None:
    entries = tile_tables.choice("forward", "hopper", "half")
    choice = configs.first_that_fills("forward", entries, K, B, processors=132)
    assert (choice.classes, choice.rows) == expected
