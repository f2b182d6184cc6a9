"""The loss and the rest of PyTorch: opcheck, gradcheck, compile, autocast, second backwards, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gistops
from gistops import backends

from .loss_oracle import Call, Options, gradients
from .oracle import Sample, generator

f64 = torch.float64
ALL = Options("none", smoothing=0.1, bias=True, weight=True, margin="cosine")


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("subcenters", [False, True])
def test_opcheck(optional: bool, subcenters: bool, fused: str, seed: int) -> None:
    call = Call.of(Sample(37, 130, 20, 0 if subcenters else 3), ALL, seed)
    x, w, delta, tau, bias, _ = call.leaves()
    if subcenters:
        w = torch.randn(130, 3, 20, requires_grad=True)
    both = (torch.randn(3, 20), torch.randn(3, 2)) if optional and not subcenters else (None, None)
    if both[0] is not None:
        delta = delta[:0].detach()
    extra = (
        (bias, *both, call.target.long(), call.weight)
        if optional
        else (None, *both, call.target.long(), None)
    )
    ops = backends.ops(fused)
    forward, backward = ops.cross_entropy_parts_forward.default, ops.cross_entropy_parts_backward.default
    torch.library.opcheck(forward, (x, w, delta, tau, *extra, -100))
    with torch.no_grad():
        made = forward(x, w, delta, tau, *extra, -100)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in (x, w, delta, tau, *extra)]
    grads = [torch.randn_like(t) for t in made]
    for needs in ((True,) * 5, (True, False, False, False, True), (False, True, True, True, False)):
        torch.library.opcheck(backward, (*grads, *frozen, -100, made[0], *needs))


@pytest.mark.parametrize("options", [Options("none"), ALL, Options("mean", smoothing=0.2, margin="angle")])
def test_gradcheck(options: Options, backend: str, seed: int) -> None:
    call = Call.of(Sample(3, 5, 4, 2, f64, f64, f64), options, seed)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return call.ours(list(leaves), backend)

    assert torch.autograd.gradcheck(function, call.leaves(f64))


@pytest.mark.parametrize("B", [37, 400])
def test_two_backwards_of_one_graph(B: int, fused: str, seed: int) -> None:
    """The second backward has no stashed scores; it recomputes them and gives the same gradients."""
    call = Call.of(Sample(B, 530, 330, 3), ALL, seed)
    leaves = call.leaves()
    loss, lse = call.ours(leaves, fused)
    first = torch.autograd.grad(loss.sum() + lse.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(loss.sum() + lse.sum(), leaves, retain_graph=True)
    third = torch.autograd.grad(loss.sum() + lse.sum(), leaves)
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(third, first, atol=1e-5, rtol=1e-4)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(65, 2, 81, 0), (400, 530, 330, 3), (300, 90, 128, 4), (37, 64, 64, 2)], ids=str
)
def test_stashed_and_recomputed_scores_have_the_same_bits(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    leaves = Sample(*sizes, dtype, dtype, dtype).tensors(seed)
    target = torch.randint(sizes[1], sizes[:1], generator=generator(seed))

    outputs: Any = gistops.constellation_cross_entropy(*leaves, target, return_lse=True, backend="cpu")
    loss, lse = outputs
    first = torch.autograd.grad(loss + lse.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(loss + lse.sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_gradients_accumulate_and_do_not_alias(fused: str, seed: int) -> None:
    """The stash becomes the gradient; a second step must not write into the first gradient."""
    call = Call.of(Sample(20, 530, 330, 3), Options(ignored=0.0), seed)
    leaves = call.leaves()
    call.ours(leaves, fused)[0].backward()
    kept, copy = leaves[1].grad, leaves[1].grad.clone()
    first = call.ours(leaves, fused)[0]
    second = call.ours(leaves, fused)[0]
    assert torch.equal(kept, copy)
    (first + second).backward()
    torch.testing.assert_close(leaves[1].grad, 3 * copy, atol=1e-6, rtol=1e-4)


def test_weights_changed_before_the_backward_raise(fused: str, seed: int) -> None:
    leaves = Sample(20, 53, 33, 3).tensors(seed)
    loss = gistops.constellation_cross_entropy(*leaves, torch.zeros(20, dtype=torch.int64), backend=fused)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("needed", range(6))
def test_only_the_gradients_asked_for(needed: int, fused: str, seed: int) -> None:
    call = Call.of(Sample(37, 530, 330, 3), ALL, seed)
    every = call.leaves()
    expected = gradients(*call.ours(every, fused), every, seed)[needed]
    alone = [t.detach().requires_grad_(i == needed) for i, t in enumerate(call.leaves())]
    loss, lse = call.ours(alone, fused)
    value = gradients(loss, lse, alone[needed : needed + 1], seed)[0]
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


def test_second_derivatives_raise(fused: str, seed: int) -> None:
    for B in (5, 400):  # with and without a stash
        leaves = Sample(B, 53, 330, 3).tensors(seed)
        target = torch.zeros(B, dtype=torch.int64)
        loss = gistops.constellation_cross_entropy(*leaves, target, backend=fused)
        (gradient,) = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"differentiable once; .* backend='reference'"):
            gradient.sum().backward()


def test_no_grad_and_inference_mode(backend: str, seed: int) -> None:
    call = Call.of(Sample(20, 530, 330, 3), ALL, seed)
    expected = call.ours(call.leaves(), backend)
    with torch.no_grad():
        made = call.ours(call.leaves(), backend)
    assert not made[0].requires_grad
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(call.ours(call.leaves(), backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool, fused: str, seed: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda call, leaves: call.ours(leaves, fused), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in (37, 12):
        call = Call.of(Sample(rows, 67, 330, 3), ALL, seed)
        leaves = call.leaves()
        expected, made = call.ours(leaves, fused), compiled(call, leaves)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            gradients(*made, leaves, seed), gradients(*expected, leaves, seed), atol=1e-4, rtol=1e-4
        )


def test_gradient_checkpointing(fused: str, seed: int) -> None:
    call = Call.of(Sample(37, 67, 330, 3), ALL, seed)
    leaves = call.leaves()
    plain = call.ours(leaves, fused)
    made = checkpoint(lambda *t: call.ours(list(t), fused), *leaves, use_reentrant=False)
    for a, b in zip(gradients(*made, leaves, seed), gradients(*plain, leaves, seed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu  # GPUs multiply in the autocast dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu(dtype: torch.dtype, backend: str, seed: int) -> None:
    """The operands are rounded if the processor has units for the dtype."""
    call = Call.of(Sample(37, 67, 20, 3), ALL, seed)
    leaves = call.leaves()
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    rounds = backend == "cpu" and torch.ops.gistops.cpu_multiplies(dtype)
    expected = call.ours(
        [x.detach().to(dtype) if rounds and i < 3 else x for i, x in enumerate(leaves)], backend
    )
    with torch.autocast("cpu", dtype=dtype):
        made = call.ours(leaves, backend)
    assert made[0].dtype == made[1].dtype == torch.float32
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert [g.dtype for g in gradients(*made, leaves, seed)] == [t.dtype for t in leaves]


PEAK = """
import torch, gistops, ctypes, pathlib
torch.manual_seed(0)
def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
B, K, d = {B}, {K}, 64
x, w, delta = (torch.randn(*s, requires_grad=True) for s in ((B, d), (K, d), (4, d)))
y = torch.randint(0, K, (B,))
def run():
    for t in (x, w, delta): t.grad = None
    {call}
run()
for t in (x, w, delta): t.grad = None
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run()
print(status("VmHWM") - before)
"""
CALLS = {
    "loss": "gistops.constellation_cross_entropy(x, w, delta, 16.0, y).backward()",
    "loss, no stash": "gistops.constellation_cross_entropy(x, w.detach(), delta, 16.0, y).backward()",
    "topk": "gistops.constellation_topk(x, w, delta, 16.0, 5, return_lse=True)",
    "rotation": "gistops.constellation_cross_entropy(x, w, delta, 16.0, y, transform='rotation', "
    "axis=torch.ones(d)).backward()",
}


@pytest.mark.cpu
@pytest.mark.parametrize("call", CALLS)
def test_memory_does_not_grow_with_the_pairs(call: str, fused: str) -> None:
    """Beyond the gradients, a step adds less than a tenth of one [B, K] tensor."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    B, K, d = 1024, 60_000, 64
    code = PEAK.format(B=B, K=K, call=CALLS[call])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gradient = 0 if call == "topk" or "no stash" in call else 4 * K * d
    assert int(done.stdout) - gradient < 0.1 * 4 * B * K


def test_errors_name_the_argument(backend: str, seed: int) -> None:
    x, w, delta, tau = Sample(6, 12, 20, 2).tensors(seed)
    target = torch.zeros(6, dtype=torch.int64)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"target": None}, TypeError, "target: expected a torch.Tensor, got NoneType"),
        ({"target": target.float()}, TypeError, "target: expected int64 or int32 .*float32; for class prob"),
        ({"target": target.bool()}, TypeError, "target: expected int64 or int32 classes, got torch.bool"),
        ({"target": target[:5]}, ValueError, r"target: expected shape \[6\], got \[5\]"),
        ({"target": F.one_hot(target, 12)}, ValueError, r"target: expected shape \[6\], got \[6, 12\]"),
        ({"target": target.to("meta")}, ValueError, "target: expected device .*, got meta"),
        ({"class_bias": torch.ones(11)}, ValueError, r"class_bias: expected shape \[12\], .*, got \[11\]"),
        ({"class_bias": torch.ones(12).long()}, TypeError, "class_bias: expected float32, .* torch.int64"),
        ({"weight": torch.ones(12, 1)}, ValueError, r"weight: expected shape \[12\], .* got \[12, 1\]"),
        ({"weight": torch.ones(12, requires_grad=True)}, ValueError, "weight: expected .* needs no gradient"),
        ({"margin": torch.ones(3)}, ValueError, r"margin: expected shape \[12\], .* got \[3\]"),
        ({"margin_kind": "arc"}, ValueError, "margin_kind: expected one of 'logit', .* got 'arc'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer .*, got 1.5"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.1"),
        ({"transform": "shift"}, ValueError, "transform: expected 'translation', .* got 'shift'"),
        ({"axis": torch.ones(20)}, ValueError, "axis: expected None unless transform='rotation'"),
        ({"transform": "rotation"}, TypeError, "axis: expected a torch.Tensor, got NoneType"),
    ]  # fmt: skip
    for change, kind, words in cases:
        arguments = {"target": target, "backend": backend} | change
        with pytest.raises(kind, match=words):
            gistops.constellation_cross_entropy(x, w, delta, tau, **arguments)
    with pytest.raises(ValueError, match=r"centers: expected shape \[K, M, 20\]"):
        gistops.subcenter_cross_entropy(x, w, tau, target, backend=backend)


@pytest.mark.cpu  # a device-side assertion makes the GPU unusable for the process
@pytest.mark.parametrize("value", [-5, 20])
@pytest.mark.parametrize("transform", ["translation", "rotation", "mlp"])
def test_a_target_out_of_range_in_a_compiled_graph(transform: str, value: int, seed: int) -> None:
    head = gistops.nn.ConstellationClassifier(8, 11, 3, transform=transform)
    target = torch.zeros(6, dtype=torch.int64)
    x = torch.randn(6, 8)
    compiled = torch.compile(head.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, target), head.loss(x, target))
    target[4] = value
    with pytest.raises((RuntimeError, IndexError), match="expected 0 to 10"):
        compiled(x, target)
    with pytest.raises((RuntimeError, IndexError), match="expected 0 to 10"):
        torch.vmap(lambda t: head.loss(x, t))(target[None])
