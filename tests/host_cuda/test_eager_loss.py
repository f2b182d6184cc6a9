"""The loss in eager mode (gistops/backends/eager_loss.py) with the host-compiled CUDA kernels as ops on CPU tensors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from gistops._classifier import Classifier, LossOptions
from gistops.backends import eager_loss, native
from gistops.operators import cross_entropy as ops_of_loss
from gistops.operators import registry
from tests.ops.oracle import Sample

from .host_cross_entropy import HostLoss

NAMES = ("cross_entropy_parks", "parked_cross_entropy_forward", "parked_cross_entropy_backward")


def schema(name: str) -> str:
    """Return the schema of an op from csrc/schema.cpp."""
    source = (native.source_dir() / "schema.cpp").read_text(encoding="utf-8")
    for definition in re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", source):
        text = "".join(re.findall(r'"([^"]*)"', definition))
        if text.startswith(f"{name}("):
            return text
    raise AssertionError(f"csrc/schema.cpp: expected a schema of {name}, found none")


def host_loss(module: Any, a: Any, scores: str, saved: dict[str, Any] | None = None) -> HostLoss:
    """Return a loss from arguments of the forward or of the backward; saved: from its forward."""
    return HostLoss(
        module,
        [a.input, a.centers, a.displacements, a.tau],
        a.target,
        scores,
        saved,
        (a.input_coeffs, a.class_coeffs),
        class_bias=a.class_bias,
        weight=a.weight,
        margin=a.margin,
        margin_kind=list(ops_of_loss.MARGIN_KINDS)[a.margin_kind],
        reduction=list(ops_of_loss.REDUCTIONS)[a.reduction],
        ignore_index=a.ignore_index,
        label_smoothing=a.label_smoothing,
    )


def tensors(saved: dict[str, Any], *names: str) -> list[Tensor]:
    return [torch.from_numpy(saved[name]) for name in names]


STATE = ("center_rnorms", "input_rnorms", "row_stats", "scalars")


def register(module: Any) -> Any:
    """Register the ops of the loss on CPU tensors; return their namespace."""
    ops = torch.ops.gistops_host
    if hasattr(ops, "cross_entropy_parks"):
        return ops

    def forward(a: Any) -> tuple[Tensor, ...]:
        loss = host_loss(module, a, "kept" if a.keep_scores else "recomputed")
        empty = (torch.empty(0, 0), torch.empty(0, 0, dtype=torch.uint8))
        scores = tensors(loss.saved, "scores", "slots") if a.keep_scores else empty
        in_range = torch.from_numpy(loss.saved["targets_in_range"])
        return loss.loss, loss.lse, in_range, *scores, *tensors(loss.saved, *STATE)

    def gradients(a: Any, scores: Any, slots: Any) -> tuple[Tensor, ...]:
        state = (a.center_rnorms, a.input_rnorms, a.rows, a.scalars)
        saved = {name: x.numpy() for name, x in zip(STATE, state, strict=True)}
        saved |= {"scores": scores, "slots": slots, "loss": None, "lse": None, "targets_in_range": None}
        loss = host_loss(module, a, "", saved)
        found = loss.gradients(a.grad_loss, a.grad_lse)
        return tuple(torch.empty(0) if x is None else x for x in found)

    def backward(a: Any) -> tuple[Tensor, ...]:
        kept = a.scores.numel() > 0
        return gradients(a, *((a.scores.numpy(), a.slots.numpy()) if kept else (None, None)))

    registry.define(ops, ops_of_loss.CROSS_ENTROPY_FORWARD, forward, ["CPU"])
    registry.define(ops, ops_of_loss.CROSS_ENTROPY_BACKWARD, backward, ["CPU"])
    library = torch.library.Library("gistops_host", "FRAGMENT")
    registry._libraries.append(library)
    for name in NAMES:
        library.define(schema(name))

    def parks(*operands: Tensor) -> bool:
        return HostLoss.parks(module, [*operands, torch.ones(())])

    def parked_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *others, stash = arguments
        names = [a.name for a in ops.parked_cross_entropy_forward.default._schema.arguments][:-1]
        given = dict(zip(names, others, strict=True)) | {"input_coeffs": None, "class_coeffs": None}
        loss = host_loss(module, ops_of_loss.CrossEntropyForward(**given, keep_scores=False), "parked")
        stash.view(torch.uint16).copy_(torch.from_numpy(loss.saved["scores"]))
        in_range = torch.from_numpy(loss.saved["targets_in_range"])
        return loss.loss, loss.lse, in_range, *tensors(loss.saved, *STATE)

    def parked_backward(*arguments: Any) -> tuple[Tensor, ...]:
        *others, stash = arguments
        names = [a.name for a in ops.parked_cross_entropy_backward.default._schema.arguments][:-1]
        given = dict(zip(names, others, strict=True)) | {"need_centers": True}
        missing = dict.fromkeys(("lse", "scores", "slots", "input_coeffs", "class_coeffs"))
        a = ops_of_loss.CrossEntropyBackward(**given | missing)
        found = gradients(a, stash.view(torch.uint16).numpy(), None)
        return found[0], *found[2:4], *found[6:]

    for name, kernel in zip(NAMES, (parks, parked_forward, parked_backward), strict=True):
        library.impl(name, kernel, "CPU")
    return ops


class Call:
    """A loss whose scores can be parked, and its leaves."""

    def __init__(self, module: Any, seed: int) -> None:
        self.ops = register(module)
        self.leaves = Sample(20, 40, 64, 3, *[torch.bfloat16] * 3).tensors(seed)
        self.bias = torch.rand(40, requires_grad=True)

    def loss(self, reduction: str = "mean") -> Tensor:
        x, *classifier = self.leaves
        options = LossOptions(class_bias=self.bias, reduction=reduction)
        target = torch.arange(20)
        return eager_loss.cross_entropy(
            self.ops, x, Classifier(*classifier), (None, None), target, options, False
        )[0]

    def gradients(self, loss: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [*self.leaves, self.bias], **options)


@pytest.fixture
def call(module: Any, seed: int) -> Call:
    return Call(module, seed)


def close(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, true in zip(values, expected, strict=True):
        torch.testing.assert_close(value, true, atol=2e-3 * float(true.abs().max()), rtol=2e-2)


def test_parked_scores_give_the_gradients_of_kept_ones(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = call.loss()
    assert loss.grad_fn is not None
    (stash,) = loss.grad_fn.stash
    gradients = call.gradients(loss)
    assert gradients[1].data_ptr() == stash.data_ptr()
    monkeypatch.setattr(eager_loss, "PARK_SCORES", False)
    kept = call.loss()
    assert not kept.grad_fn.stash
    assert torch.equal(kept, loss)
    close(gradients, call.gradients(kept))


def test_a_second_backward_recomputes_parked_scores(call: Call) -> None:
    loss = call.loss()
    first = call.gradients(loss, retain_graph=True)
    copies = tuple(g.clone() for g in first)
    second = call.gradients(loss, retain_graph=True)
    third = call.gradients(loss)
    assert all(map(torch.equal, first, copies))  # no gradient is overwritten
    close(second, first)
    close(third, first)


def test_batched_gradients_leave_parked_scores(call: Call) -> None:
    loss = call.loss("none")
    gradients = call.gradients(loss, grad_outputs=torch.eye(20), is_grads_batched=True, retain_graph=True)
    assert len(loss.grad_fn.stash) == 1
    close(tuple(g.sum(0) for g in gradients), call.gradients(loss.sum()))


def test_frozen_centers_are_not_parked(call: Call) -> None:
    call.leaves[1].requires_grad_(False)
    loss = call.loss()
    assert not loss.grad_fn.stash
    assert torch.autograd.grad(loss, call.leaves[0])[0].isfinite().all()


def test_a_parked_score_is_rounded_to_21_bits(module: Any, seed: int) -> None:
    values = torch.cat(
        [torch.randn(200) * 10 ** torch.randn(200), torch.tensor([3e38, -2e-38, 1.0, 0.0, -0.0])]
    )
    for i, z in enumerate(values.tolist()):
        score, slot = module.parked(z, i % 8)
        assert slot == i % 8
        assert abs(score - z) <= 2**-21 * abs(z)
    for slot in range(8):
        assert module.parked(torch.inf, slot) == (torch.inf, slot)
        assert module.parked(-torch.inf, slot) == (-torch.inf, slot)
        score, nan_slot = module.parked(torch.nan, slot)
        assert math.isnan(score)
        assert nan_slot == slot


def test_scores_that_do_not_fit_are_not_parked(module: Any, seed: int) -> None:
    for sizes in ((20, 40, 56, 3), (20, 40, 64, 8), (20, 40, 66, 3), (33, 40, 88, 3)):
        assert not HostLoss.parks(module, Sample(*sizes, *[torch.bfloat16] * 3).tensors(seed))
    assert not HostLoss.parks(module, Sample(20, 40, 64, 3).tensors(seed))
    assert HostLoss.parks(module, Sample(20, 40, 64, 7, *[torch.bfloat16] * 3).tensors(seed))
