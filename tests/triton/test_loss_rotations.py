"""The whole loss of rotations: options, dtypes, chunks, launches, degenerate vectors. Run by test_interpreter.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops
from gistops._classifier import Classifier, LossOptions, no_displacements
from gistops.backends import eager_loss
from tests.ops.loss_oracle import OPTIONS, Call, Options, gradients
from tests.ops.oracle import Sample, check_values, error
from tests.ops.vector_oracle import VectorSample, by_definition

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

from gistops.backends.triton import loss_scores

from .test_loss import Launches

half, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
EXTRA = Options("none", smoothing=0.2, bias=True, weight=True, margin="cosine")
#: Bounds of errors relative to 1 + the largest value. In half precision, gradients are rounded to the dtype of the leaves.
BOUNDS = {f64: 1e-6, torch.float32: 1e-4, half: 4e-3, bf16: 3e-2}


def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 64 classes, the minimum."""
    monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)


def recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)


def call_of(sample: VectorSample, options: Options, seed: int) -> tuple[list[Tensor], Call]:
    """Return input, centers, tau, displacements and axis, and the target, bias, margin and weight of a call."""
    call = Call.of(Sample(sample.B, sample.K, sample.d, 0), options, seed)
    return [t.detach() for t in sample.tensors(seed)], call


def ours(tensors: list[Tensor], call: Call, **more: Any) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Return loss and lse by the public function, and their leaves, with bias and margin if they are used."""
    o = call.options
    used = [t for t, uses in ((call.bias, o.bias), (call.margin, o.margin)) if uses]
    x, w, tau, delta, axis, *extra = leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *used)]
    arguments: dict[str, Any] = {
        "class_bias": extra[0] if o.bias else None, "weight": call.weight if o.weight else None,
        "margin": extra[-1] if o.margin else None, "margin_kind": o.margin or "logit", "reduction": o.reduction,
        "label_smoothing": o.smoothing, "return_lse": True, "backend": "triton",
    }  # fmt: skip
    made: Any = gistops.constellation_cross_entropy(
        x, w, delta, tau, call.target, transform="rotation", axis=axis, **arguments | more
    )
    return made, leaves


def truth(tensors: list[Tensor], call: Call) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Return loss, lse and the leaves by the definition in float64."""
    o = call.options
    options: dict[str, Any] = {
        "class_bias": call.bias if o.bias else None, "weight": call.weight if o.weight else None,
        "margin": call.margin if o.margin else None, "margin_kind": o.margin or "logit", "reduction": o.reduction,
        "label_smoothing": o.smoothing,
    }  # fmt: skip
    loss, lse, leaves = by_definition(tensors, call.target, options, f64)
    return (loss, lse), leaves


def compare(tensors: list[Tensor], call: Call, seed: int, bound: float) -> None:
    made, leaves = ours(tensors, call)
    node: Any = made[0].grad_fn
    assert "_FunctionBackward" in type(node).__name__  # the whole loss, not its parts
    assert [t.dtype for t in node.saved_tensors[:2]] == [t.dtype for t in tensors[:2]]  # the products' dtypes
    true, wide = truth(tensors, call)
    values, expected = (
        [*pair, *gradients(*pair, ends, seed)] for pair, ends in ((made, leaves), (true, wide))
    )
    check_values(values, expected, bound)
    for leaf, gradient in zip(leaves, values[2:], strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)


@pytest.mark.parametrize("tiles", ["small"], indirect=True)
@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_options_of_rotations(index: int, tiles: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Half of the cases recompute the scores, in chunks of 64 classes."""
    if index % 2:
        recomputed(monkeypatch)
        chunked(monkeypatch)
    compare(*call_of(VectorSample("rotation", 21, 70, 3, 20), OPTIONS[index], seed), seed, 1e-4)


@pytest.mark.parametrize(
    "sample",
    [
        VectorSample("rotation", 9, 70, 2, 21, f64),
        VectorSample("rotation", 9, 40, 10, 24, half),
        VectorSample("rotation", 9, 40, 3, 16, bf16),
        VectorSample("rotation", 5, 20, 1, 9),
        VectorSample("rotation", 70, 70, 4, 24),
        VectorSample("rotation", 1, 1, 2, 8),
    ],
    ids=lambda sample: sample.id,
)
def test_dtypes_and_sizes_of_rotations(
    sample: VectorSample, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Chunks of kept scores."""
    chunked(monkeypatch)
    compare(*call_of(sample, EXTRA, seed), seed, BOUNDS[sample.dtype])


def test_zero_vectors_of_rotations(seed: int) -> None:
    tensors, call = call_of(VectorSample("rotation", 9, 40, 3, 20), OPTIONS[4], seed)
    tensors[0][3] = 0
    tensors[1][5] = 0
    compare(tensors, call, seed, 1e-4)


def test_a_tiny_tau_of_rotations(seed: int) -> None:
    tensors, call = call_of(VectorSample("rotation", 5, 20, 3, 16), OPTIONS[0], seed)
    tensors[2].fill_(1e-25)
    made, leaves = ours(tensors, call)
    true, wide = truth(tensors, call)
    pairs = (gradients(*made, leaves, seed), gradients(*true, wide, seed))
    for value, right in zip(*pairs, strict=True):
        assert value.isfinite().all()
        assert error(value, right) <= 1e-5 * (1 + float(right.norm()))


def test_rotations_without_rows(seed: int) -> None:
    tensors, call = call_of(VectorSample("rotation", 4, 5, 3, 8), Options("sum"), seed)
    tensors[0] = tensors[0][:0]
    x, w, tau, delta, axis = (t.requires_grad_() for t in tensors)
    loss = gistops.constellation_cross_entropy(
        x, w, delta, tau, call.target[:0], transform="rotation", axis=axis, reduction="sum", backend="triton"
    )
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [w, tau, delta, axis]):
        assert not gradient.any()


def arguments_of_the_op(seed: int, keep: bool = True) -> dict[str, Any]:
    x, w, tau, *_ = VectorSample("rotation", 5, 20, 3, 16).tensors(seed)
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    coeffs = [torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, 20, requires_grad=True)]
    with torch.no_grad():
        coeffs[1][:, 0] = 0
    return {
        "input": x, "centers": w, "displacements": no_displacements(x), "tau": tau, "input_coeffs": coeffs[0],
        "class_coeffs": coeffs[1], "target": torch.arange(5), "class_bias": torch.randn(20, requires_grad=True),
        "weight": None, "margin": torch.tensor(0.2, requires_grad=True), "margin_kind": 1, "reduction": 0,
        "ignore_index": -100, "label_smoothing": 0.1, "keep_scores": keep,
    }  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_rotations(keep: bool, seed: int) -> None:
    arguments = list(arguments_of_the_op(seed, keep).values())
    ops = torch.ops.gistops_triton
    torch.library.opcheck(ops.cross_entropy_forward.default, tuple(arguments))
    with torch.no_grad():
        made = ops.cross_entropy_forward.default(*arguments)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in arguments[:10]]
    grads = (torch.randn_like(made[0]), torch.randn_like(made[1]))
    needs = (True,) * 6 if keep else (False, True, False, False, True, False)
    torch.library.opcheck(
        ops.cross_entropy_backward.default, (*grads, *frozen, made[1], *made[3:], *arguments[10:14], *needs)
    )


def test_coefficients_alone(seed: int) -> None:
    """The gradients of the coefficients do not depend on those that are needed beside them."""
    arguments = list(arguments_of_the_op(seed).values())
    ops = torch.ops.gistops_triton
    with torch.no_grad():
        made = ops.cross_entropy_forward.default(*arguments)
        common = (made[0], made[1], *arguments[:10], made[1], *made[3:], *arguments[10:14])
        every = ops.cross_entropy_backward.default(*common, *[True] * 6)
        alone = ops.cross_entropy_backward.default(*common, *[False] * 6)
    assert all(g.any() for g in every[4:6])
    assert not every[5][:, 0].any()
    for i, gradient in enumerate(alone):
        assert torch.equal(gradient, every[i]) if i in (4, 5) else gradient.numel() == 0


def test_ties_and_nan_of_rotations(seed: int) -> None:
    arguments = arguments_of_the_op(seed) | {"margin": None}
    x, y = (arguments[name].detach() for name in ("input_coeffs", "class_coeffs"))
    x[:, 2] = x[:, 1]
    y[:, 2] = y[:, 1]
    y[:, 1:, 3] = 0  # all slots are equal
    y[0, 1:, 7] = torch.nan
    made = torch.ops.gistops_triton.cross_entropy_forward.default(
        *(arguments | {"input_coeffs": x, "class_coeffs": y}).values()
    )
    scores, slots = made[3][:, :5], made[4][:, :5]
    assert slots.max() == 1, "slots 1 and 2 are equal, so the lower wins"
    assert not slots[3].any()
    assert (slots[7] == 1).all(), "the lowest of several NaN"
    assert scores[7].isnan().all()
    assert scores[:7].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_coeffs": None}, "expected both or neither, got one"),
        ({"input_coeffs": torch.zeros(4, 3)}, r"input_coeffs: expected shape \[5, 3\], got \[4, 3\]"),
        ({"input_coeffs": torch.zeros(5, 0)}, r"input_coeffs: expected shape \[B, M\] .*got \[5, 0\]"),
        ({"input_coeffs": torch.zeros(5, 257)}, r"input_coeffs: expected shape \[B, M\] .*got \[5, 257\]"),
        ({"class_coeffs": torch.zeros(2, 3, 19)}, r"class_coeffs: expected shape \[2, 3, 20\], got \[2, 3, 19\]"),
        ({"class_coeffs": torch.zeros(2, 3, 20).long()}, "class_coeffs: expected float32, .*got torch.int64"),
        ({"class_coeffs": torch.zeros(2, 3, 20, device="meta")}, "class_coeffs: expected device cpu .*got meta"),
        ({"displacements": torch.zeros(1, 16)}, r"expected centers \[K, d\] and no displacements, got .*\[1, 16\]"),
        ({"centers": torch.zeros(20, 2, 16)}, r"expected centers \[K, d\] and no displacements, got \[20, 2, 16\]"),
    ],
)  # fmt: skip
def test_arguments_of_rotations(changed: dict[str, Any], message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gistops_triton.cross_entropy_forward.default(
            *(arguments_of_the_op(seed) | changed).values()
        )


@pytest.mark.parametrize(("keep", "launches"), [(True, 11), (False, 12)])
def test_a_step_takes_few_launches(
    keep: bool, launches: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Coefficients are leaves here: PyTorch computes them, and its launches are not those of the loss."""
    arguments = arguments_of_the_op(seed)
    if not keep:
        recomputed(monkeypatch)
    x, w, displacements, tau, *coeffs = list(arguments.values())[:6]
    options = LossOptions(arguments["class_bias"], None, arguments["margin"], "cosine", "mean", -100, 0.1)
    classifier, ops = Classifier(w, displacements, tau, "rotation"), torch.ops.gistops_triton
    leaves = [x, w, tau, *coeffs, arguments["class_bias"], arguments["margin"]]
    with Launches(monkeypatch) as counted:
        made = eager_loss.cross_entropy(
            ops, x, classifier, (coeffs[0], coeffs[1]), arguments["target"], options, False
        )
        torch.autograd.grad(made[0], leaves, torch.ones_like(made[0]))
    seen = counted.seen
    assert seen.pop("mm") == (3 if keep else 4)
    del seen["ones_like"]
    assert sum(seen.values()) <= launches, dict(seen)


@pytest.mark.parametrize("keep", [True, False])
def test_same_bits_of_rotations(keep: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    tensors, call = call_of(VectorSample("rotation", 21, 70, 3, 20), OPTIONS[6], seed)
    chunked(monkeypatch)
    if not keep:
        recomputed(monkeypatch)

    def bits() -> list[Tensor]:
        made, leaves = ours(tensors, call)
        return [*made, *gradients(*made, leaves, seed)]

    assert all(torch.equal(a, b) for a, b in zip(bits(), bits(), strict=True))


def test_the_forward_alone_keeps_nothing(seed: int) -> None:
    """Without a graph, operands stay in half precision."""
    tensors, call = call_of(VectorSample("rotation", 21, 70, 3, 24, bf16), OPTIONS[0], seed)
    with torch.no_grad():
        made, _ = ours(tensors, call)
    true, _ = truth(tensors, call)
    for value, right in zip(made, true, strict=True):
        assert error(value, right) <= 1e-4 * (1 + float(right.detach().abs().max()))
