"""The loss's kernels: number of launches, kept and recomputed scores, pairs that cancel, PyTorch. Run by test_interpreter.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gistops
from tests.ops import test_cancellation as cancellation
from tests.ops import test_dynamic_numbers as dynamic
from tests.ops import test_in_place as in_place
from tests.ops import test_loss as loss
from tests.ops import test_loss_extremes as extremes
from tests.ops import test_loss_torch as in_torch
from tests.ops.loss_oracle import OPTIONS, Call, Options, gradients
from tests.ops.oracle import Sample, error

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from gistops.backends import eager_loss
from gistops.backends.triton import loss_scores

bf16, f64 = torch.bfloat16, torch.float64
#: aten ops that launch no kernel.
FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "view",
    "slice",
    "select",
    "t",
    "transpose",
    "detach",
    "as_strided",
}
FREE |= {"alias", "promote_types"}


class Launches(TorchDispatchMode):
    """A counter of launches, ours and torch's, without the calls that the interpreter makes itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False
        run = InterpretedFunction.run

        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen[function.fn.__name__] += 1
            self.inside = True
            try:
                return run(function, *args, **kwargs)
            finally:
                self.inside = False

        monkeypatch.setattr(InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in FREE and not self.inside:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "dtype", "kept"),
    [
        *((options, dtype, True) for options in (Options(), OPTIONS[4], OPTIONS[7]) for dtype in (torch.float32, f64)),
        (OPTIONS[4], torch.float32, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_takes_few_launches(
    options: Options, dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Beside the products, a step with all gradients takes few launches; on a GPU each costs one or two µs.

    A backward that recomputes scores takes two more: for f·δ, and for pairs that cancel.
    """
    call = Call.of(Sample(32, 40, 16, 3, dtype, dtype, dtype), options, seed)
    leaves = [t.to(dtype).requires_grad_() for t in call.leaves()]
    target, weight = call.target.long(), call.weight.to(dtype)
    used = [*leaves[:4], *([leaves[4]] if options.bias else []), *([leaves[5]] if options.margin else [])]
    call = dataclasses.replace(call, target=target, weight=weight)
    # The checks of a target on the CPU do not run on a GPU.
    monkeypatch.setattr(
        "gistops.functional.cross_entropy.check_loss",
        lambda input, classifier, target, options: (target, options),
    )
    if not kept:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
    with Launches(monkeypatch) as launches:
        made = call.ours(leaves, "triton", return_lse=False)
        torch.autograd.grad(made, used, torch.ones_like(made))
    seen = launches.seen
    # The gradient of the centers is included, in these dtypes.
    assert seen.pop("mm") == (3 if kept else 4)
    del seen["ones_like"]
    assert sum(seen.values()) <= (10 if kept else 12), dict(seen)


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[8]], ids=lambda o: o.id)
def test_recomputed_scores(options: Options, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Use chunks of 64 classes, the minimum, in both directions."""
    monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    loss.compare(Call.of(Sample(21, 150, 20, 3), options, seed), "triton", seed)


@pytest.mark.parametrize("sample", [Sample(37, 70, 20, 4), Sample(18, 90, 33, 20), Sample(5, 40, 9, 40)])
@pytest.mark.parametrize("option", [2, 6])
def test_beyond_every_tile(sample: Sample, option: int, tiles: str, seed: int) -> None:
    loss.compare(Call.of(sample, OPTIONS[option], seed), "triton", seed)


def with_cancelled_pairs(call: Call) -> Call:
    """Return the call with centers that cancel, exactly and nearly, a target's center among them."""
    x, w, delta, tau = (t.clone() for t in call.tensors)
    for place, noise in ((0, 0.0), (17, 1e-3), (40, 1e-2)):
        w[place] = -delta[0] + noise * torch.randn_like(delta[0])
    target = call.target.clone()
    target[1] = 17
    return dataclasses.replace(call, tensors=[x, w, delta, tau], target=target)


@pytest.mark.parametrize("held", [True, False])
def test_pairs_that_cancel(held: bool, tiles: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    if not held:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    call = with_cancelled_pairs(Call.of(Sample(37, 70, 20, 3), OPTIONS[6], seed))
    leaves = call.leaves()
    made = call.ours(leaves, "triton")
    made = (*made, *gradients(*made, leaves, seed))
    wide = call.leaves(f64)
    truth = call.ours(wide, "reference")
    truth = (*truth, *gradients(*truth, wide, seed))
    for value, expected in zip(made, truth, strict=True):
        assert value.isfinite().all()
        assert error(value, expected) <= 2e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("held", [True, False])
def test_pairs_that_cancel_to_any_degree(held: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    if not held:
        monkeypatch.setattr(eager_loss, "MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(loss_scores, "CHUNK_ELEMENTS", 1)
    for closeness in (1e-3, 1e-7, 0.0):
        tensors, target = cancellation.sample(9, 16, closeness, seed)
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = cancellation.loss_of(leaves, target, "triton")
        cancellation.assert_close([value, *torch.autograd.grad(value, leaves)], tensors, target)


def test_zero_vectors(seed: int) -> None:
    call = Call.of(Sample(9, 40, 20, 2), OPTIONS[4], seed)
    call.tensors[0][3] = 0
    call.tensors[1][5] = 0
    leaves, wide = call.leaves(), call.leaves(f64)
    made, truth = call.ours(leaves, "triton"), call.ours(wide, "reference")
    of_made, of_truth = gradients(*made, leaves, seed), gradients(*truth, wide, seed)
    for value, expected in zip((*made, *of_made), (*truth, *of_truth), strict=True):
        assert error(value, expected) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_same_bits(tiles: str, seed: int) -> None:
    call = Call.of(Sample(37, 150, 20, 3), OPTIONS[6], seed)

    def bits() -> list[Tensor]:
        leaves = call.leaves()
        made = call.ours(leaves, "triton")
        return [*made, *gradients(*made, leaves, seed)]

    assert all(torch.equal(a, b) for a, b in zip(bits(), bits(), strict=True))


def test_contract(seed: int) -> None:
    for index in (-100, 3):
        loss.test_ignored_rows_count_for_nothing(index, 0.2, "triton", seed)
    loss.test_classes_excluded_by_their_bias("triton", seed)
    loss.test_non_finite_values_are_not_hidden(float("nan"), True, "triton", seed)
    loss.test_layouts("triton", seed)
    loss.test_an_angle_beyond_pi_still_costs_more("triton", seed)


@pytest.mark.parametrize("case", extremes.FEW, ids=extremes.identifier)
def test_extreme_biases_and_margins(case: dict[str, Any], seed: int) -> None:
    extremes.test_extreme_biases_and_margins(case, 0.1, "triton", seed)


def test_a_mean_of_targets_without_weight_is_nan(seed: int) -> None:
    extremes.test_a_mean_of_targets_without_weight_is_nan(0.1, 1, "triton", seed)


def test_one_graph_serves_all_values(seed: int) -> None:
    dynamic.test_one_graph_serves_all_values("ignore_index", "triton", "cpu", seed)


def test_in_place_changes_of_arguments(seed: int) -> None:
    in_place.test_every_argument_of_a_loss("translation", "angle", bf16, "triton", seed)


def test_a_target_out_of_range_on_the_device(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The assertion that runs on the device finds targets out of range that no earlier check has seen."""
    monkeypatch.setattr(
        "gistops.functional.cross_entropy.check_loss",
        lambda input, classifier, target, options: (target, options),
    )
    tensors = Sample(6, 12, 20, 2).tensors(seed)
    for value in (12, -1):
        target = torch.zeros(6, dtype=torch.int64)
        target[4] = value
        with pytest.raises(RuntimeError, match="expected 0 to 11 or ignore_index -100"):
            gistops.constellation_cross_entropy(*tensors, target, backend="triton")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional: bool, keep: bool, seed: int) -> None:
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    call = Call.of(Sample(5, 20, 8, 2), in_torch.ALL, seed)
    x, w, delta, tau, bias, margin = call.leaves()
    extra = (bias, call.weight, margin) if optional else (None, None, None)
    options = (1, 0 if optional else 1, -100, 0.1 if optional else 0.0)
    ops = torch.ops.gistops_triton
    arguments = (x, w, delta, tau, None, None, call.target.long(), *extra)
    forward = ops.cross_entropy_forward.default
    torch.library.opcheck(forward, (*arguments, *options, keep))
    with torch.no_grad():
        made = forward(*arguments, *options, keep)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    grads = (torch.randn_like(made[0]), torch.randn_like(made[1]) if optional else None)
    saved = (made[1], *made[3:])
    for needs in ((True,) * 6, (False, True, False, False, False, True)):
        torch.library.opcheck(ops.cross_entropy_backward.default, (*grads, *frozen, *saved, *options, *needs))


def test_the_operators_in_pytorch(seed: int) -> None:
    in_torch.test_gradcheck(in_torch.ALL, "triton", seed)
    in_torch.test_gradcheck(Options("mean", smoothing=0.2, margin="angle"), "triton", seed)
    in_torch.test_gradient_checkpointing("triton", seed)
    in_torch.test_weights_changed_before_the_backward_raise("triton", seed)
    leaves = Sample(5, 30, 8, 2).tensors(seed)
    target = torch.zeros(5, dtype=torch.int64)
    value = gistops.constellation_cross_entropy(*leaves, target, backend="triton")
    (gradient,) = torch.autograd.grad(value.square(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiable once; .* backend='reference'"):
        gradient.sum().backward()


def test_a_graph_used_twice(seed: int) -> None:
    call = Call.of(Sample(9, 53, 16, 3), in_torch.ALL, seed)
    leaves = call.leaves()
    value, lse = call.ours(leaves, "triton")
    first = torch.autograd.grad(value.sum() + lse.sum(), leaves, retain_graph=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, torch.autograd.grad(value.sum() + lse.sum(), leaves), strict=True)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool, seed: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda call, leaves: call.ours(leaves, "triton"), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in (7, 12):
        call = Call.of(Sample(rows, 33, 16, 3), in_torch.ALL, seed)
        leaves = call.leaves()
        expected, made = call.ours(leaves, "triton"), compiled(call, leaves)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            gradients(*made, leaves, seed), gradients(*expected, leaves, seed), atol=1e-4, rtol=1e-4
        )


def test_without_gradients_no_scores_are_kept(seed: int) -> None:
    x, w, delta, tau = Sample(7, 33, 16, 3).tensors(seed, requires_grad=False)
    target = torch.randint(0, 33, (7,))
    value = gistops.constellation_cross_entropy(x, w, delta, tau, target, backend="triton")
    logits = gistops.constellation_logits(x, w, delta, tau, backend="reference")
    torch.testing.assert_close(value, F.cross_entropy(logits, target), atol=1e-5, rtol=1e-5)
