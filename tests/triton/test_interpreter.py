"""The tests that run under Triton's interpreter, in processes of their own.

TRITON_INTERPRET must be set before the kernels are defined. It changes what `backend="triton"` and torch.compile do, so
no other test may see it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
import torch

import gistops
from tests.ops.oracle import Sample

HERE = Path(__file__).parent
#: The files that share a process.
TOGETHER = (
    ("exact", "precision", "topk"),
    (
        "loss",
        "loss_forms",
        "loss_rotations",
        "half_rotations",
        "streaming",
        "autocast",
        "op_checks",
        "storage",
    ),
)
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton==3.8.0")
OUTDATED = triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (
    2,
    4,
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already under the interpreter")
@pytest.mark.skipif(OUTDATED, reason="the interpreter of Triton 3.6 fails with numpy 2.4 and newer")
def test_kernels_under_the_interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each of the two processes uses one core for minutes, so they run in parallel."""
    seed = f"--seed={request.config.getoption('--seed')}"
    environment = dict(os.environ) | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda names: interpreted(names, seed, environment, tmp_path), TOGETHER))
    assert sum(int(counts["tests"]) for counts in found) >= 90
    for counts in found:
        assert all(int(counts[what]) == 0 for what in ("skipped", "failures", "errors")), counts


def interpreted(
    names: tuple[str, ...], seed: str, environment: dict[str, str], folder: Path
) -> dict[str, str]:
    """Run the files' tests; return pytest's counts."""
    report = folder / f"{names[0]}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    command += [*(str(HERE / f"test_{name}.py") for name in names), f"--junitxml={report}", seed]
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return dict(ElementTree.parse(report).getroot()[0].attrib)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there the backend is available")
def test_without_a_gpu_the_error_says_what_to_do() -> None:
    tensors = Sample(2, 3, 4, 1).tensors(0, requires_grad=False)
    with pytest.raises(gistops.BackendUnavailable, match=r"'triton' is not available: .*TRITON_INTERPRET=1"):
        gistops.constellation_logits(*tensors, backend="triton")
    if not torch.cuda.is_available():
        assert gistops.backends.why_not("triton", "cuda") == "torch finds no GPU"
