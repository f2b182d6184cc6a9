"""The kernels compared with the definition in float64, and used through PyTorch. Run by test_interpreter.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import gistops
from tests.ops import test_contract as contract
from tests.ops import test_exact as exact
from tests.ops.oracle import (
    SAMPLES,
    Sample,
    allowed,
    allowed_of_tau,
    error,
    gradients,
    leaves,
    plain,
    routed,
    scores,
)

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
# Sizes above 16, the small tiles, in every dimension, and no multiples of a tile.
ODD = [
    Sample(37, 53, 41, 4),
    Sample(19, 35, 21, 20),  # more slots than are unrolled
    Sample(33, 47, 35, 4, bf16, bf16, bf16),
    Sample(33, 47, 35, 4, half, half, half),
    Sample(33, 47, 35, 4, f64, f64, f64),
    Sample(33, 47, 35, 2, half, bf16, half),
]
# The samples of tests/ops that the interpreter finishes in time; the time grows with B·K.
FEASIBLE = [s for s in SAMPLES if s.B * s.K <= 10_000]
CASES = [
    *(pytest.param(sample, "small", id=f"{sample.id}-small") for sample in ODD),
    *(pytest.param(sample, "large", id=f"{sample.id}-large") for sample in FEASIBLE),
]


@pytest.mark.parametrize(("sample", "tiles"), CASES, indirect=["tiles"])
def test_logits_and_slots(sample: Sample, tiles: str, seed: int) -> None:
    exact.test_logits_and_slots(sample, "triton", seed)


@pytest.mark.parametrize(("sample", "tiles"), CASES, indirect=["tiles"])
def test_gradients(sample: Sample, tiles: str, seed: int) -> None:
    exact.test_gradients(sample, "triton", seed)


CANCELLING = [
    *((2, torch.float32, closeness) for closeness in (1e-1, 1e-3, 1e-6, 0.0)),
    *((2, dtype, 1e-3) for dtype in (half, bf16, f64)),
    (17, torch.float32, 1e-3),
]


# Large tiles take the interpreter 15 s per case: one per reason to differ from small ones.
CANCELLING_TILES = [
    *((*case, "small") for case in CANCELLING),
    *((2, torch.float32, closeness, "large") for closeness in (1e-3, 0.0)),
    (2, bf16, 1e-3, "large"),
    (17, torch.float32, 1e-3, "large"),
]


@pytest.mark.parametrize(("m", "dtype", "closeness", "tiles"), CANCELLING_TILES, indirect=["tiles"])
def test_pairs_that_cancel(tiles: str, m: int, dtype: torch.dtype, closeness: float, seed: int) -> None:
    """P + Q loses all digits if w_k + δ_j is zero or close to it, and must not be used."""
    K, last = (
        (37, 20) if tiles == "small" else (133, 90)
    )  # more classes than a tile, and pairs that cancel in several tiles
    tensors = Sample(17 if m < 9 else 5, K, 23, m, dtype, dtype, dtype).tensors(seed)
    with torch.no_grad():
        tensors[1][12:last] = -tensors[2][1] + closeness * tensors[1][12:last]
    grad = torch.randn(tensors[0].shape[0], K, generator=torch.Generator().manual_seed(seed + 1))
    grad *= 1e-3 if dtype == half else 1  # gradients of the order of 1 / closeness, which float16 must hold
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
    wide = leaves(tensors, f64)
    truth = (wide[3] * scores(*wide[:3])).max(dim=2).values
    assert (slots[:, 12:last] == 2).any() or closeness == 0, (
        "the cancelled slot wins nowhere, so that nothing is tested"
    )
    assert error(logits, truth) <= allowed(error(plain(tensors)[0], truth), truth, logits.dtype)
    ours = torch.autograd.grad(logits, tensors, grad.to(logits.dtype))
    if closeness == 0:
        assert all(g.isfinite().all() for g in ours)
        return  # |w + δ| is 0 or a rounding: no truth to compare with
    expected = gradients(lambda *t: routed(*t, slots), wide, grad)
    bounds = [
        allowed(0.0, true, tensor.dtype, 17 * K) for tensor, true in zip(tensors, expected, strict=True)
    ]
    bounds[3] = allowed_of_tau(grad, logits, tensors[3], expected[3], torch.float32)
    for value, true, bound in zip(ours, expected, bounds, strict=True):
        assert error(value, true) <= bound


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_a_pair_that_cancels_in_later_rows_only(tiles: str, seed: int) -> None:
    """The flag for pairs that cancel belongs to one tile of rows."""
    tensors = Sample(35, 37, 23, 2).tensors(seed)
    with torch.no_grad():
        direction = tensors[1][20].clone()
        tensors[1][20] = -tensors[2][1] + 1e-3 * direction
        tensors[0][:32] = -direction + 0.1 * direction.norm() * tensors[0][:32] / 23**0.5
        tensors[0][32:] = direction + 0.1 * direction.norm() * tensors[0][32:] / 23**0.5
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
    assert not (slots[:32, 20] == 2).any()
    assert (slots[32:, 20] == 2).all()
    grad = torch.randn(35, 37)
    ours = torch.autograd.grad(logits, tensors, grad)
    expected = gradients(lambda *t: routed(*t, slots), leaves(tensors, f64), grad)
    for value, true in zip(ours, expected, strict=True):
        assert error(value, true) <= allowed(0.0, true, torch.float32, 35 * 37)


def test_slot_weights_sum_the_weights(seed: int) -> None:
    """S' is the sum of the unrounded weights H', which are class-major and zero from B on."""
    from gistops.backends.triton import gradients as kernels
    from gistops.backends.triton.launch_args import LaunchArgs

    tensors = Sample(21, 70, 23, 3, half, half, half).tensors(seed, requires_grad=False)
    saved = kernels.Saved(torch.randn(21, 70), *run_operator(tensors))
    result = kernels.route(
        LaunchArgs.of(*tensors, allow_tf32=False), saved, kernels.Needs(True, True, True, True)
    )
    assert result.weights.dtype == half
    weights, slots = result.weights[:, :21].T.double(), saved.slots.long()
    expected = torch.zeros(21, 4, dtype=f64).scatter_add(1, slots, weights)
    most = 2e-3 * float(weights.abs().max())
    torch.testing.assert_close(result.slot_weights.T.double(), expected, rtol=1e-3, atol=most)
    assert not result.weights[:, 21:].any()


def test_tiny_vectors(seed: int) -> None:
    """A clamped norm is a constant: a vector below 1e-12 scores less than its cosine and has no correction."""
    tensors = Sample(6, 40, 19, 2).tensors(seed)
    tiny = [(0, [2]), (1, [5]), (2, [])]
    with torch.no_grad():
        tensors[0][2] *= 1e-13
        tensors[1][5] *= 1e-13
        tensors[2] *= 1e-13  # so that the tiny center's vectors are all tiny
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
    wide = leaves(tensors, f64)
    torch.testing.assert_close(logits.double(), routed(*wide, slots), rtol=1e-5, atol=1e-6)
    grad = torch.randn(6, 40)
    ours = torch.autograd.grad(logits, tensors, grad)
    expected = gradients(lambda *t: routed(*t, slots), wide, grad)
    for index, rows in tiny:
        value, true = ours[index].double(), expected[index]
        others = [i for i in range(len(true)) if i not in rows]
        for part in (rows, others):
            if part:
                torch.testing.assert_close(
                    value[part], true[part], rtol=0, atol=3e-5 * float(true[part].abs().max())
                )


@pytest.mark.parametrize("dtype", [torch.float32, half])
def test_zero_vectors_give_others_nothing(dtype: torch.dtype, seed: int) -> None:
    """Weights of about 1e12 are multiplied by zero vectors; the gradients of other vectors are right, also in float16."""
    tensors = Sample(6, 40, 19, 2, dtype, dtype, dtype).tensors(seed)
    zero = [[2], [5, 9], [0]]  # rows of input, centers and displacements whose own gradients may be huge
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][5] = 0
        tensors[1][9] = -tensors[2][0]
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
    assert not logits[2].any()
    grad = torch.randn(6, 40)
    ours = torch.autograd.grad(logits, tensors, grad)
    expected = gradients(lambda *t: routed(*t, slots), leaves(tensors, f64), grad)
    for value, true, rows in zip(ours[:3], expected[:3], zero, strict=True):
        others = [i for i in range(len(true)) if i not in rows]
        assert error(value[others], true[others]) <= allowed(0.0, true[others], dtype, 240)
        if dtype == torch.float32:
            torch.testing.assert_close(
                value[rows].double(), true[rows], rtol=1e-4, atol=1e-4 * float(true[rows].abs().max())
            )


@pytest.mark.parametrize("m", [1, 4])
def test_ties_go_to_the_lowest_slot(m: int, seed: int) -> None:
    contract.test_ties_go_to_the_lowest_slot(torch.float32, 45, m, "triton", seed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_what_is_not_finite_gives_nan_where_it_is_used(value: float, argument: int, seed: int) -> None:
    contract.test_non_finite_values_give_nan_where_they_are_used(value, argument, "triton", seed)


def test_zero_vectors_score_zero(seed: int) -> None:
    contract.test_zero_vectors_score_zero_with_finite_gradients("triton", seed)


@pytest.mark.parametrize(("B", "K", "m"), [(0, 5, 2), (3, 0, 2), (0, 0, 0), (1, 1, 0), (2, 1, 4)])
def test_empty_and_tiny(B: int, K: int, m: int, seed: int) -> None:
    contract.test_empty_and_tiny(B, K, m, "triton", seed)


def test_norms_without_rows(seed: int) -> None:
    tensors = Sample(0, 21, 7, 3).tensors(seed, requires_grad=False)
    rnorms = run_operator(tensors)[2]
    vectors = tensors[1] + torch.nn.functional.pad(tensors[2], (0, 0, 1, 0))[:, None]
    torch.testing.assert_close(rnorms.abs(), 1 / vectors.norm(dim=2))


def test_layouts(seed: int) -> None:
    contract.test_layouts("triton", seed)


def run_operator(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    gistops.constellation_logits(*tensors, backend="triton")  # defines the ops
    return tuple(torch.ops.gistops_triton.logits_forward(*tensors))


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_same_inputs_give_the_same_bits(tiles: str, seed: int) -> None:
    tensors = Sample(37, 53, 21, 4).tensors(seed)
    grad = torch.randn(37, 53)

    def bits() -> list[Tensor]:
        logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend="triton")
        return [logits, slots, *torch.autograd.grad(logits, tensors, grad)]

    first = bits()
    torch.empty(1 << 20).normal_()  # changes what the allocator returns
    assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


@pytest.mark.parametrize("cancelled", [False, True])
def test_only_the_gradients_asked_for(cancelled: bool, seed: int) -> None:
    """Frozen arguments get no gradient, and do not change the gradients of others."""
    tensors = Sample(9, 20, 11, 2).tensors(seed, requires_grad=False)
    if cancelled:
        tensors[1][3:5] = -tensors[2][1] + 1e-2 * tensors[1][3:5]
    saved = run_operator(tensors)
    assert (saved[2] < 0).any() == cancelled
    grad = torch.randn(9, 20)
    backward = torch.ops.gistops_triton.logits_backward
    every = backward(grad, *tensors, *saved, True, True, True, True)
    for needs in itertools.product([False, True], repeat=4):
        some = backward(grad, *tensors, *saved, *needs)
        for needed, value, expected in zip(needs, some, every, strict=True):
            assert torch.equal(value, expected) if needed else value.numel() == 0


@pytest.mark.parametrize(
    "sample", [Sample(9, 10, 7, 2), Sample(5, 7, 3, 0), Sample(4, 5, 7, 1, bf16, bf16, half)]
)
def test_opcheck(sample: Sample, seed: int) -> None:
    tensors = sample.tensors(seed)
    saved = run_operator([t.detach() for t in tensors])
    torch.library.opcheck(torch.ops.gistops_triton.logits_forward.default, tuple(tensors))
    frozen = [t.detach() for t in tensors]
    for needs in ((True, True, True, True), (True, False, True, False)):
        arguments = (torch.randn_like(saved[0]), *frozen, *saved, *needs)
        torch.library.opcheck(torch.ops.gistops_triton.logits_backward.default, arguments)


def test_gradcheck(seed: int) -> None:
    tensors = Sample(3, 5, 4, 2, f64, f64, f64).tensors(seed)
    tensors[3] = tensors[3].detach().double().requires_grad_()

    def logits(*t: Tensor) -> Tensor:
        return gistops.constellation_logits(*t, backend="triton")

    assert torch.autograd.gradcheck(logits, tensors, fast_mode=True)


def test_compile_without_a_graph_break(seed: int) -> None:
    tensors = Sample(21, 35, 20, 4).tensors(seed)
    grad = torch.randn(21, 35)

    def function(*t: Tensor) -> Tensor:
        return gistops.constellation_logits(*t, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for run in (compiled, compiled):  # traced, then from the cache
        expected = [function(*tensors), *torch.autograd.grad(function(*tensors), tensors, grad)]
        value = [run(*tensors), *torch.autograd.grad(run(*tensors), tensors, grad)]
        assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True))


def test_operators_called_without_the_checks_stay_safe(seed: int) -> None:
    tensors = Sample(3, 5, 8, 2).tensors(seed, requires_grad=False)
    saved = run_operator(tensors)
    forward, backward = torch.ops.gistops_triton.logits_forward, torch.ops.gistops_triton.logits_backward
    with pytest.raises(RuntimeError, match=r"centers: expected shape \[K, 8\], got \[5, 7\]"):
        forward(tensors[0], tensors[1][:, :7], *tensors[2:])
    with pytest.raises(RuntimeError, match="tau: expected one element"):
        forward(*tensors[:3], torch.ones(2))
    with pytest.raises(RuntimeError, match=r"grad: expected shape \[3, 5\], got \[3, 4\]"):
        backward(torch.ones(3, 4), *tensors, *saved, True, True, True, True)
    slots = torch.full_like(saved[1], 255)
    backward(saved[0], *tensors, saved[0], slots, *saved[2:], True, True, True, True)
