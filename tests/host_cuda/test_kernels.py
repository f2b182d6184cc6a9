"""The CUDA kernels on the host: the tests of the files of cases, and most under the sanitizers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.oracle import Sample

from .build import sanitized_pytest
from .conftest import build_kernels
from .cross_entropy_cases import *  # noqa: F403
from .fused_logits_cases import *  # noqa: F403
from .grad_centers_cases import *  # noqa: F403
from .host_logits import HostLogits
from .logits_cases import *  # noqa: F403  the tests themselves
from .logits_storage_cases import *  # noqa: F403
from .topk_cases import *  # noqa: F403
from .vector_loss_cases import *  # noqa: F403

CASES = [
    str(Path(__file__).with_name(f"{name}_cases.py"))
    for name in (
        "logits",
        "logits_storage",
        "fused_logits",
        "cross_entropy",
        "grad_centers",
        "topk",
        "vector_loss",
    )
]


def test_under_address_and_undefined_behavior_sanitizers(cache: Path, request: pytest.FixtureRequest) -> None:
    """Every load and store of the kernels stays within the memory that the kernel was given."""
    sanitized = build_kernels(cache, sanitize=True)
    seed = f"--seed={request.config.getoption('--seed')}"
    done = sanitized_pytest(
        sanitized, [*CASES, seed, "-k", "forward or gradients or empty or 0.001 or loss or topk"]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 30
    assert "skipped" not in done.stdout


def test_a_failed_launch_raises(module: Any, seed: int) -> None:
    sample = Sample(1, 1024, 4096, 0, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    kernels = HostLogits(module, sample.tensors(seed))
    module.set_compute_capability(80)
    module.set_shared_memory(64 << 10)  # less than the wide tiles of grad_centers_kernel need
    try:
        with pytest.raises(RuntimeError, match="gistops: grad_centers: invalid argument"):
            kernels.gradients(torch.ones(1, 1024), (False, True, False, False))
    finally:
        module.set_compute_capability(90)
        module.set_shared_memory(227 << 10)
