"""The CUDA kernels on the host: every case of kernel_cases.py, and some of them under the sanitisers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.oracle import Sample

from .build import sanitized_pytest
from .conftest import build_kernels
from .kernel_cases import *  # noqa: F403  the tests themselves
from .loss_cases import *  # noqa: F403
from .operators import HostKernels, Way

CASES = [str(Path(__file__).with_name(name)) for name in ("kernel_cases.py", "loss_cases.py")]


def test_under_address_and_undefined_behaviour_sanitizers(
    cache: Path, request: pytest.FixtureRequest
) -> None:
    """Every load and store of the kernels is inside what it was given."""
    sanitized = build_kernels(cache, sanitize=True)
    seed = f"--seed={request.config.getoption('--seed')}"
    done = sanitized_pytest(sanitized, [*CASES, seed, "-k", "forward or gradients or empty or 0.001 or loss"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30
    assert "skipped" not in done.stdout


def test_with_less_shared_memory_than_a_data_center_gpu_has(compiled_module: Any, seed: int) -> None:
    """GPUs with 99 KiB of shared memory a block get smaller tiles; the results are the same."""
    tensors = Sample(261, 66, 72, 4, torch.bfloat16, torch.bfloat16, torch.bfloat16).tensors(seed)
    wide = HostKernels(Way(compiled_module, fused=True), tensors)
    compiled_module.set_shared_memory(99 << 10)
    try:
        narrow = HostKernels(Way(compiled_module, fused=True), tensors)
    finally:
        compiled_module.set_shared_memory(227 << 10)
    torch.testing.assert_close(narrow.logits, wide.logits)


def test_what_a_launch_refuses_is_raised(compiled_module: Any, seed: int) -> None:
    tensors = Sample(70, 66, 72, 4).tensors(seed)
    compiled_module.set_shared_memory(16 << 10)
    try:
        with pytest.raises(RuntimeError, match="gistops: forward: invalid argument"):
            HostKernels(Way(compiled_module, fused=True), tensors)
    finally:
        compiled_module.set_shared_memory(227 << 10)
