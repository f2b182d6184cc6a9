"""The whole loss of sub-centers: options, dtypes, chunks, launches, degenerate vectors. Run by test_interpreter.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import gistops
from gistops.backends import eager_loss
from tests.ops.loss_oracle import OPTIONS, Call, Options, gradients
from tests.ops.oracle import Sample, check_values, error
from tests.ops.test_subcenter import SubcenterSample, routed
from tests.ops.test_subcenter import scores as cosines

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

from gistops.backends.triton import loss_scores

from .test_loss import Launches

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
EXTRA = Options("none", smoothing=0.2, bias=True, weight=True, margin="cosine")
#: Bounds of errors relative to 1 + the largest value: a few roundings of the weights H', which are in the operands' dtype.
BOUNDS = {f64: 1e-6, torch.float32: 1e-4, half: 4e-3, bf16: 3e-2}


def subcenter_call(sample: SubcenterSample, options: Options, seed: int) -> Call:
    x, w, tau = sample.tensors(seed, requires_grad=False)
    call = Call.of(Sample(sample.B, sample.K, sample.d, 0), options, seed)
    call.tensors[:] = [x, w, call.tensors[2].to(x.dtype), tau]
    return call


def forward(tensors: list[Tensor], target: Tensor, *extra: Any, keep: bool = True) -> tuple[Tensor, ...]:
    """Call the op: (loss, lse, in_range, scores, slots, center_rnorms, input_rnorms, rows, scalars)."""
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    op = torch.ops.gistops_triton.cross_entropy_forward.default
    made: tuple[Tensor, ...]
    made = op(*tensors, None, None, target, *(extra or (None, None, None)), 0, 1, -100, 0.0, keep)
    return made


def compare(call: Call, seed: int, bound: float) -> None:
    """Compare loss, lse and gradients with the definition for the slots that the kernels have chosen."""
    B = call.tensors[0].shape[0]
    slots = forward(call.tensors, call.target)[4][:, :B].T
    leaves, wide = call.leaves(), call.leaves(f64)
    every = cosines(wide[0], wide[1])
    chosen = every.gather(2, slots.long()[..., None])[..., 0]
    assert error(chosen, every.max(dim=2).values) <= bound
    truth = call.written_out(routed(wide[0], wide[1], wide[3], slots), wide)
    made = call.ours(leaves, "triton")
    values = [*made, *gradients(*made, leaves, seed)]
    expected = [*truth, *gradients(*truth, wide, seed)]
    check_values(values, expected, bound)
    for leaf, gradient in zip(leaves, values[2:], strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_options_of_subcenters(index: int, tiles: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Half of the cases recompute the scores, in chunks of 21 classes."""
    if index % 2:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    compare(subcenter_call(SubcenterSample(21, 70, 3, 20), OPTIONS[index], seed), seed, 1e-4)


@pytest.mark.parametrize(
    "sample",
    [
        SubcenterSample(9, 70, 2, 21, f64, f64),
        SubcenterSample(9, 40, 12, 16, half, half),
        SubcenterSample(9, 40, 3, 16, bf16, bf16),
        SubcenterSample(5, 20, 40, 9, bf16, torch.float32),
        SubcenterSample(5, 20, 1, 9),
        SubcenterSample(1, 1, 1, 1),
    ],
    ids=str,
)
def test_dtypes_and_sizes_of_subcenters(
    sample: SubcenterSample, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Chunks of kept scores: the products of a few classes at a time."""
    monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    bound = max(BOUNDS[sample.input], BOUNDS[sample.centers])
    compare(subcenter_call(sample, EXTRA, seed), seed, bound)


def test_zero_vectors_and_ties_of_subcenters(seed: int) -> None:
    call = subcenter_call(SubcenterSample(9, 40, 3, 20), OPTIONS[4], seed)
    x, w = call.tensors[:2]
    x[3] = 0
    w[5] = 0
    w[6, 1] = 0
    w[7, 2] = w[7, 0]
    slots = forward(call.tensors, call.target)[4][:, :9]
    assert not slots[5].any()
    assert slots[7].max() <= 1
    compare(call, seed, 1e-4)


def test_a_tiny_tau_and_what_is_not_finite(seed: int) -> None:
    call = subcenter_call(SubcenterSample(5, 20, 2, 8), OPTIONS[0], seed)
    call.tensors[3].fill_(1e-25)
    leaves = call.leaves()
    loss, lse = call.ours(leaves, "triton")
    made = gradients(loss, lse, leaves, seed)
    wide = call.leaves(f64)
    truth = gradients(*call.ours(wide, "reference"), wide, seed)
    for value, true in zip(made, truth, strict=True):
        assert value.isfinite().all()
        assert error(value, true) <= 1e-5 * (1 + float(true.norm()))
    call = subcenter_call(SubcenterSample(5, 20, 3, 8), OPTIONS[0], seed)
    call.tensors[1][7, 1:] = torch.nan
    slots, scores = (forward(call.tensors, call.target)[i][:, :5] for i in (4, 3))
    assert (slots[7] == 1).all(), "the lowest of several NaN"
    assert scores[7].isnan().all()
    assert scores[:7].isfinite().all()


def test_without_rows(seed: int) -> None:
    x, w, tau = SubcenterSample(0, 5, 2, 8).tensors(seed)
    loss: Any = gistops.subcenter_cross_entropy(
        x, w, tau, torch.zeros(0, dtype=torch.int64), reduction="sum", backend="triton"
    )
    assert loss == 0
    assert not torch.autograd.grad(loss, w)[0].any()


@pytest.mark.parametrize(("keep", "launches"), [(True, 11), (False, 12)])
def test_a_step_takes_few_launches(
    keep: bool, launches: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    call = subcenter_call(SubcenterSample(32, 40, 3, 16), OPTIONS[4], seed)
    call = dataclasses.replace(call, target=call.target.long())
    leaves = call.leaves()
    # The checks of a target on the CPU do not run on a GPU.
    monkeypatch.setattr(
        "gistops.functional.cross_entropy.check_loss",
        lambda input, classifier, target, options: (target, options),
    )
    if not keep:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
    with Launches(monkeypatch) as counted:
        made = call.ours(leaves, "triton", return_lse=False)
        torch.autograd.grad(made, [*leaves[:2], *leaves[3:]], torch.ones_like(made))
    seen = counted.seen
    assert seen.pop("mm") == (3 if keep else 4)
    del seen["ones_like"]
    assert sum(seen.values()) <= launches, dict(seen)


@pytest.mark.parametrize("keep", [True, False])
def test_same_bits(keep: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    call = subcenter_call(SubcenterSample(21, 70, 3, 20), OPTIONS[6], seed)
    monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    if not keep:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)

    def bits() -> list[Tensor]:
        leaves = call.leaves()
        made = call.ours(leaves, "triton")
        return [*made, *gradients(*made, leaves, seed)]

    assert all(torch.equal(a, b) for a, b in zip(bits(), bits(), strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_subcenters(keep: bool, seed: int) -> None:
    call = subcenter_call(SubcenterSample(5, 20, 2, 8), EXTRA, seed)
    *vectors, bias, margin = call.leaves()
    arguments = (*vectors, None, None, call.target, bias, call.weight, margin, 1, 1, -100, 0.2)
    ops = torch.ops.gistops_triton
    torch.library.opcheck(ops.cross_entropy_forward.default, (*arguments, keep))
    with torch.no_grad():
        made = ops.cross_entropy_forward.default(*arguments, keep)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in arguments[:10]]
    grads = (torch.randn_like(made[0]), torch.randn_like(made[1]))
    for needs in ((True,) * 6, (False, True, False, False, True, False), (True, *(False,) * 5)):
        torch.library.opcheck(
            ops.cross_entropy_backward.default,
            (*grads, *frozen, made[1], *made[3:], *arguments[10:], *needs),
        )


def test_arguments_of_the_op(seed: int) -> None:
    x, w, tau = SubcenterSample(3, 5, 2, 8).tensors(seed, requires_grad=False)
    target, none = torch.zeros(3, dtype=torch.int64), torch.empty(0, 8)
    for centers, shown in ((w[..., :7], r"\[5, 2, 7\]"), (w[:, :0], r"\[5, 0, 8\]"), (w[:0], "none")):
        with pytest.raises(RuntimeError, match=rf"centers: expected .*got {shown}"):
            forward([x, centers, none, tau], target)
    with pytest.raises(
        RuntimeError, match=r"centers: expected shape \[K, 8\] with displacements, got \[5, 2, 8\]"
    ):
        forward([x, w, torch.zeros(1, 8), tau], target)
