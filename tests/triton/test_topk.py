"""Top-k by kernels of its own. Run by test_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import gistops
from tests.ops.oracle import Sample, generator
from tests.ops.test_topk import check_against_float64

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

from gistops.backends.triton import configs, topk
from gistops.backends.triton.tile_tables import Config
from gistops.operators.topk import FusedTopk, Topk

half, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: Each sample has several tiles of classes and of rows, if it has several classes and rows.
CASES = [
    (Sample(19, 70, 24, 3), 6),
    (Sample(5, 70, 33, 12, spread=1.0), 17),
    (Sample(1, 1, 1, 0), 1),
    (Sample(3, 40, 16, 0), 40),
    (Sample(17, 70, 40, 2, bf16, bf16, bf16), 1),
    (Sample(3, 66, 24, 2, half, half, half), 5),
    (Sample(2, 66, 24, 2, half, f32, bf16), 3),
]
LAUNCHES = ["norms_in_registers_kernel", "topk_partials_kernel", "topk_cancelled_kernel", "topk_merge_kernel"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launched kernels."""
    names: list[str] = []
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with configs.forced(topk=Config(classes=32, rows=16, dims=16, warps=4, stages=1)):
        yield


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("sample", "k"), CASES, ids=[f"{s.id}-{k}" for s, k in CASES])
@pytest.mark.usefixtures("small_tiles")
def test_against_float64(sample: Sample, k: int, biased: bool, launched: list[str], seed: int) -> None:
    bias = torch.randn(sample.K, generator=generator(seed)) if biased else None
    check_against_float64(sample.tensors(seed, requires_grad=False), k, bias, "triton")
    assert launched.count("topk_partials_kernel") == 1


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.usefixtures("small_tiles")
def test_groups_of_several_tiles(programs: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "TOPK_PROGRAMS", programs)
    check_against_float64(Sample(18, 130, 8, 2).tensors(seed, requires_grad=False), 3, None, "triton")


@pytest.mark.usefixtures("small_tiles")
def test_centers_that_a_displacement_nearly_cancels(seed: int) -> None:
    """Their classes fill more than a tile, and win as well in one row."""
    tensors = Sample(17, 60, 24, 3).tensors(seed, requires_grad=False)
    tensors[1][7:50] = -tensors[2][1] + 0.02 * tensors[1][7:50]
    tensors[0][0] = tensors[1][9] + tensors[2][1]
    for bias in (None, torch.randn(60, generator=generator(seed)) / 100):
        values, classes, slots, lse = check_against_float64(tensors, 4, bias, "triton")
        assert values.isfinite().all()
        assert lse.isfinite().all()
        if bias is None:
            assert (int(classes[0, 0]), int(slots[0, 0])) == (9, 2)


@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_lowest_class(seed: int) -> None:
    """Across tiles, groups and lists; the scores come from the bias."""
    bias = torch.randint(0, 4, (150,), generator=generator(seed)).float()
    for k in (1, 20):
        values, classes, slots, lse = run_on_bias(bias, k)
        order = bias.sort(descending=True, stable=True).indices[:k]
        assert torch.equal(classes, order.expand(3, k))
        assert torch.equal(values, bias[order].expand(3, k))
        assert not slots.any()
        torch.testing.assert_close(lse, bias.double().logsumexp(0).float().expand(3))


@pytest.mark.usefixtures("small_tiles")
def test_scores_that_are_not_finite() -> None:
    bias = torch.full((150,), -torch.inf)
    bias[[100, 20, 140, 3]] = torch.tensor([torch.nan, torch.inf, -torch.nan, -2.0])
    bias[[7, 9]] = torch.tensor([-0.0, 0.0])
    values, classes, _, lse = run_on_bias(bias, 8)
    assert classes.tolist() == [[100, 140, 20, 7, 9, 3, 0, 1]] * 3
    assert values[:, :2].isnan().all()
    assert values[0, 2:].tolist() == [torch.inf, 0.0, 0.0, -2.0, -torch.inf, -torch.inf]
    assert lse.isnan().all()
    bias[[100, 140]] = 0.0
    assert run_on_bias(bias, 1)[3].tolist() == [torch.inf] * 3
    bias.fill_(-torch.inf)
    values, classes, _, lse = run_on_bias(bias, 2)
    assert classes.tolist() == [[0, 1]] * 3
    assert lse.tolist() == values[:, 0].tolist() == [-torch.inf] * 3


def run_on_bias(bias: Tensor, k: int) -> tuple[Tensor, ...]:
    """Return the outputs for three rows whose scores are the biases."""
    x, w, tau = torch.zeros(3, 8), torch.ones(len(bias), 8), torch.tensor(1.0)
    return gistops.constellation_topk(x, w, w[:0], tau, k, class_bias=bias, return_lse=True, backend="triton")


def test_without_the_log_sum_exp(seed: int) -> None:
    tensors = Sample(5, 70, 8, 2).tensors(seed, requires_grad=False)
    with_it = topk.topk(FusedTopk(*tensors, None, 4, True))
    without = topk.topk(FusedTopk(*tensors, None, 4, False))
    assert without.lse.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_it[:3], strict=True))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that torch's operators return, and the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **options or {})
        self.operators.append(str(function))
        self.elements = max(self.elements, result.numel() if isinstance(result, Tensor) else 0)
        return result


@pytest.mark.parametrize("m", [0, 2])
def test_launches_and_memory_do_not_grow_with_the_classes(
    m: int, launched: list[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Neither launches nor torch's operators depend on K, and no tensor has B·K elements."""
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **o: launched.append(self.fn.__name__)
    )
    expected = [name for name in LAUNCHES if m or "cancelled" not in name]
    B, found = 64, []
    for K in (100, 50_000):
        tensors = Sample(B, K, 16, m).tensors(seed, requires_grad=False)
        with LargestTensor() as mode:
            topk.topk(FusedTopk(*tensors, None, 10, True))
        assert launched == expected
        launched.clear()
        found.append(mode)
    assert found[0].operators == found[1].operators
    assert found[1].elements <= B * topk.TOPK_MERGE[-1][0] < B * 50_000 // 4


def test_calls_that_the_kernels_serve(launched: list[str]) -> None:
    x, w, delta, tau = Sample(2, 200, 3, 1).tensors(0, requires_grad=False)
    assert topk.can_fuse(Topk(x, w, delta, tau, None, None, None, 64))
    assert not topk.can_fuse(Topk(x, w, delta, tau, None, None, None, 65))
    assert not topk.can_fuse(Topk(x, w.double(), delta, tau, None, None, None, 1))
    assert not topk.can_fuse(Topk(x, w[:, None], delta[:0], tau, None, None, None, 1))
    for k, bias in ((0, None), (201, None), (65, None), (1, torch.zeros(199))):
        with pytest.raises(RuntimeError, match="k: expected" if bias is None else "class_bias: expected"):
            topk.topk(FusedTopk(x, w, delta, tau, bias, k))
    assert not launched


def test_the_lists_of_a_row_fit_the_merge() -> None:
    for B in (1, 64, 65, 300, 100_000):
        for K in (1, 63, 64, 65, 8142, 1 << 24):
            for k in {1, min(K, 10), min(K, 64)}:
                group_tiles, groups = topk.grouped(B, K, k, 64, 64)
                assert groups * k <= topk.TOPK_MERGE[-1][0]
                assert groups <= configs.power_of_two(configs.TOPK_PROGRAMS)
                assert (groups - 1) * group_tiles * 64 < K <= groups * group_tiles * 64


def test_no_rows(seed: int) -> None:
    tensors = Sample(0, 40, 7, 2).tensors(seed, requires_grad=False)
    found = gistops.constellation_topk(*tensors, 3, return_lse=True, backend="triton")
    assert [t.shape for t in found] == [(0, 3), (0, 3), (0, 3), (0,)]
