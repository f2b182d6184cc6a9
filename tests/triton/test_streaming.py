"""Loss, top-k, sub-centers and rotations on top of the Triton kernels. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

from gistops.backends.chunked import scorers
from gistops.functional.transforms import mlp as mlp_transform
from tests.ops import test_autocast as autocast
from tests.ops import test_device as device
from tests.ops import test_functorch as functorch
from tests.ops import test_in_place as in_place
from tests.ops import test_loss as loss
from tests.ops import test_loss_torch as in_torch
from tests.ops import test_mlp as mlp
from tests.ops import test_rotation as rotation
from tests.ops import test_subcenter as subcenter
from tests.ops import test_topk as topk
from tests.ops.loss_oracle import OPTIONS, Call, Options
from tests.ops.oracle import Sample
from tests.ops.test_subcenter import SubcenterSample

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 64 classes, the minimum."""
    monkeypatch.setattr(scorers, "CPU_CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("options", OPTIONS, ids=[o.id for o in OPTIONS])
def test_loss(options: Options, seed: int) -> None:
    loss.compare(Call.of(Sample(21, 150, 20, 3), options, seed), "triton", seed)


@pytest.mark.parametrize("dtype", [half, bf16, f64])
def test_loss_in_other_dtypes(dtype: torch.dtype, seed: int) -> None:
    loss.compare(Call.of(Sample(9, 70, 20, 2, dtype, dtype, dtype), OPTIONS[4], seed), "triton", seed)


def test_contract_of_the_loss(seed: int) -> None:
    loss.test_all_rows_ignored("triton", seed)
    loss.test_small_losses_keep_their_digits("triton", seed)
    loss.test_margins_of_one_number("triton", seed)
    for sizes in ((0, 5, 2), (1, 1, 0), (2, 1, 4)):
        loss.test_empty_and_tiny(*sizes, "triton", seed)
    loss.test_a_target_out_of_range(12, -100, "triton", seed)


@pytest.mark.parametrize("name", device.CALLS)
def test_no_value_comes_from_the_host_or_is_read_by_it(name: str, seed: int) -> None:
    device.test_no_value_comes_from_the_host_or_is_read_by_it(name, "triton", seed)


@pytest.mark.parametrize("dtype", [torch.float32, bf16])
@pytest.mark.parametrize("name", autocast.CALLS)
def test_backward_inside_autocast(name: str, dtype: torch.dtype, seed: int) -> None:
    autocast.test_backward_inside_autocast(name, dtype, bf16, "triton", "cpu", seed)


def test_the_loss_in_pytorch(seed: int) -> None:
    in_torch.test_weights_changed_before_the_backward_raise("triton", seed)
    in_torch.test_opcheck(True, False, "triton", seed)
    in_torch.test_gradcheck(Options("none"), "triton", seed)
    call = Call.of(Sample(5, 67, 8, 2), in_torch.ALL, seed)
    leaves = call.leaves()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: call.ours([x, *leaves[1:]], "triton"), fullgraph=True, backend="aot_eager"
    )
    assert all(
        torch.equal(a, b) for a, b in zip(compiled(leaves[0]), call.ours(leaves, "triton"), strict=True)
    )


@pytest.mark.parametrize(
    "case",
    [
        (Sample(4, 70, 8, 2, bf16, bf16, bf16), 70),
        (Sample(3, 70, 8, 0, f64, f64, f64), 1),
    ],
)
def test_topk_in_chunks(case: topk.Case, seed: int) -> None:
    topk.test_values_classes_slots_and_lse(case, True, "triton", seed)


def test_contract_of_topk(seed: int) -> None:
    topk.test_nan_is_largest_and_minus_infinity_smallest("triton")
    topk.test_lse_of_infinite_scores(torch.float32, "triton", seed)
    topk.test_empty_batch("triton")
    topk.test_no_gradient("triton", seed)


@pytest.mark.parametrize(
    "sample",
    [
        SubcenterSample(21, 150, 3, 20),
        SubcenterSample(4, 67, 2, 9, bf16, bf16),
        SubcenterSample(3, 5, 20, 8, f64, f64),
    ],
)
def test_subcenters(sample: SubcenterSample, seed: int) -> None:
    subcenter.test_logits_slots_and_gradients(sample, "triton", seed)
    if sample.input == torch.float32:
        subcenter.test_loss(sample, OPTIONS[6], "triton", seed)


def test_subcenters_in_pytorch(seed: int) -> None:
    subcenter.test_ties_zeros_and_what_is_not_finite("triton", seed)
    subcenter.test_opcheck_gradcheck_and_compile("triton", seed)


@pytest.mark.parametrize(
    "sample",
    [Sample(21, 150, 20, 3), Sample(4, 67, 9, 1, bf16, bf16, bf16), Sample(3, 5, 8, 9, f64, f64, f64)],
)
def test_rotations(sample: Sample, seed: int) -> None:
    rotation.test_logits_and_gradients(sample, "triton", seed)


def test_rotations_in_pytorch(seed: int) -> None:
    rotation.test_a_displacement_along_the_axis_turns_nothing("triton", seed)
    rotation.test_zero_vectors("triton", seed)
    rotation.test_opcheck_gradcheck_and_compile("triton", seed)


def test_vectors_of_a_network(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(mlp_transform, "CHUNK_ELEMENTS", 12 * 4 * 40)
    mlp.test_logits(None, "triton", seed)
    mlp.test_loss(True, "none", None, "triton", seed)
    mlp.test_topk(None, "triton", seed)


def test_a_vmap_over_targets_and_over_all_tensors(seed: int) -> None:
    functorch.test_vmap_over_targets("triton", seed)
    for transform in ("translation", "rotation", "mlp", "subcenters"):
        functorch.test_vmap_of_a_fused_backend(transform, "loss", "triton", seed)


def test_a_loss_and_an_lse_that_are_changed_in_place(seed: int) -> None:
    in_place.test_the_loss_may_be_changed_in_place("triton", seed)
