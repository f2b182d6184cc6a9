"""Logits, slots and all gradients against the definition in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gistops
from gistops._toolchain import host_machine

from .oracle import (
    IDS,
    SAMPLES,
    Sample,
    allowed,
    allowed_of_tau,
    error,
    generator,
    gradients,
    leaves,
    plain,
    routed,
    scores,
)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_logits_and_slots(sample: Sample, backend: str, seed: int) -> None:
    tensors = sample.tensors(seed, requires_grad=False)
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=backend)
    wide = [t.double() for t in tensors]
    every = wide[3] * scores(*wide[:3])
    truth = every.max(dim=2).values

    assert logits.dtype == (torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32)
    assert slots.dtype == torch.uint8
    assert logits.shape == slots.shape == (sample.B, sample.K)
    bound = allowed(error(plain(tensors)[0], truth), truth, logits.dtype)
    assert error(logits, truth) <= bound
    # The score of the returned slot is within rounding of the best, as near-ties may go either way.
    assert error(every.gather(2, slots.long()[..., None]).squeeze(2), truth) <= 2 * bound


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_gradients(sample: Sample, backend: str, seed: int) -> None:
    tensors = sample.tensors(seed)
    grad = torch.randn(sample.B, sample.K, generator=generator(seed + 1))
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=backend)
    ours = torch.autograd.grad(logits, tensors, grad.to(logits.dtype))
    truth = gradients(lambda *t: routed(*t, slots), leaves(tensors, torch.float64), grad)
    same = gradients(lambda *t: plain(list(t))[0], leaves(tensors), grad)
    for name, tensor, value, true, comparable in zip(
        ("input", "centers", "displacements", "tau"), tensors, ours, truth, same, strict=True
    ):
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        # Plain PyTorch may resolve a near-tie differently. Then its error is not one of rounding, and eps bounds the error.
        bound = allowed(0.0, true, _coarsest(tensor.dtype, logits.dtype), max(sample.B, sample.K))
        if name == "tau":
            bound = allowed_of_tau(grad, logits, tensor, true, torch.float32)
        elif sample.d > 1:  # if d is 1, the true gradients of the vectors are zero
            bound = max(bound, min(allowed(error(comparable, true), true, tensor.dtype), 1e3 * bound))
        else:
            terms = tensors[3].detach().abs() * grad.abs().sum() * (1 / tensor.detach().abs()).sum()
            bound = max(bound, 16 * torch.finfo(tensor.dtype).eps * float(terms))
        assert error(value, true) <= bound, name


def _coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@pytest.mark.parametrize("closeness", [1e-1, 1e-3, 1e-5, 1e-6, 1e-7, 0.0])
def test_centers_that_a_displacement_nearly_cancels(closeness: float, backend: str, seed: int) -> None:
    """The sums of the fused form lose all digits where w_k + δ_j is close to zero, and must not be used."""
    tensors = Sample(37, 129, 24, 3).tensors(seed)
    with torch.no_grad():
        tensors[1][7:90] = -tensors[2][1] + closeness * tensors[1][7:90]
    grad = torch.randn(37, 129, generator=generator(seed + 1))
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=backend)
    wide = leaves(tensors, torch.float64)
    truth = (wide[3] * scores(*wide[:3])).max(dim=2).values
    assert (slots[:, 7:90] == 2).any(), "expected the cancelled slot to win somewhere"
    assert error(logits, truth) <= allowed(error(plain(tensors)[0], truth), truth, torch.float32)
    ours = torch.autograd.grad(logits, tensors, grad)
    expected = gradients(lambda *t: routed(*t, slots), wide, grad)
    bounds = [allowed(0.0, true, torch.float32, 37 * 129) for true in expected]
    bounds[3] = allowed_of_tau(grad, logits, tensors[3], expected[3], torch.float32)
    for value, true, bound in zip(ours, expected, bounds, strict=True):
        assert error(value, true) <= bound


@pytest.mark.cpu
@pytest.mark.parametrize(
    "choice", ["CAPABILITY=baseline", "CAPABILITY=v3", "PRODUCTS=blas", "PRODUCTS=onednn"]
)
def test_other_processors(choice: str, request: pytest.FixtureRequest) -> None:
    """The tests pass with the kernels and matrix products that other processors use."""
    if any(name.startswith("GISTOPS_CPU_") for name in os.environ):
        pytest.skip("already running under a forced choice")
    name, value = choice.split("=")
    if name == "CAPABILITY" and host_machine() != "x86_64":
        pytest.skip(f"{host_machine()} has one variant of the kernels")
    environment = dict(os.environ) | {f"GISTOPS_CPU_{name}": value}
    folder = Path(__file__).parent
    files = [
        __file__,
        *(
            str(folder / f"test_{name}.py")
            for name in ("loss", "topk", "subcenter", "rotation", "cancellation")
        ),
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        *files,
        "-k",
        "logits or gradients or cancel or values",
    ]
    command.append(f"--seed={request.config.getoption('--seed')}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
