"""Transforms of torch.func, dual numbers and second derivatives, against the reverse mode of the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import gistops
from gistops.nn import ConstellationClassifier

from .oracle import generator

f64 = torch.float64
B, K, d, m = 3, 6, 4, 2
Function = Callable[..., Tensor]
FORMS = [
    (transform, kind)
    for transform in ("translation", "rotation", "mlp", "subcenters")
    for kind in ("logits", "loss")
]


def function_of(transform: str, kind: str, backend: str | None) -> Function:
    """Return a function of the tensors of `leaves_of`: logits, or a loss with every option."""

    def function(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor, bias: Tensor, margin: Tensor) -> Tensor:
        options: dict[str, Any] = {"backend": backend}
        if kind == "loss":
            weight = torch.linspace(0.5, 1.5, K, dtype=f64)
            options |= {"class_bias": bias, "margin": margin, "margin_kind": "cosine", "weight": weight}
            options |= {"label_smoothing": 0.1}
            more: tuple[Tensor, ...] = (torch.tensor([1, -100, 4]),)
        else:
            more = ()
        if transform == "subcenters":
            call = gistops.subcenter_logits if kind == "logits" else gistops.subcenter_cross_entropy
            return call(x, w[:, None] + delta, tau, *more, **options)  # type: ignore[operator, no-any-return]
        call = gistops.constellation_logits if kind == "logits" else gistops.constellation_cross_entropy
        if transform == "rotation":
            options["axis"] = tau + torch.linspace(-1, 1, d, dtype=f64)
        if transform == "mlp":
            options["mlp"] = torch.outer(delta[0] * w[0], delta.repeat(1, 4)[0, : 2 * d]), w[:d, :d].T
        return call(x, w, delta, tau, *more, transform=transform, **options)  # type: ignore[operator, no-any-return]

    return function


def leaves_of(seed: int) -> list[Tensor]:
    """Return x, w, δ, τ, bias and margin in float64."""
    source = generator(seed)
    shapes = ((B, d), (K, d), (m, d), (), (K,), (K,))
    leaves = [torch.randn(shape, generator=source, dtype=f64) for shape in shapes]
    leaves[3] = leaves[3].abs() + 2
    leaves[5] = leaves[5].abs() / 8
    return leaves


def jacobians(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    """Return the Jacobian of each tensor by one backward per element of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    output = function(*leaves)
    rows = [
        torch.autograd.grad(y, leaves, retain_graph=True, materialize_grads=True) for y in output.flatten()
    ]
    return [torch.stack(row).reshape(output.shape + row[0].shape) for row in zip(*rows, strict=True)]


def applied(jacobian: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """Return the derivative of the output along the tangents."""
    pairs = zip(jacobian, tangents, strict=True)
    return torch.stack([torch.tensordot(j, t, t.dim()) for j, t in pairs]).sum(0)


def summed(jacobian: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the sum of the output."""
    return tuple(j.reshape(-1, *x.shape).sum(0) for j, x in zip(jacobian, leaves, strict=True))


@pytest.mark.parametrize(("transform", "kind"), FORMS)
def test_forward_mode(transform: str, kind: str, seed: int) -> None:
    function, leaves, tangents = function_of(transform, kind, None), leaves_of(seed), leaves_of(seed + 1)
    jacobian = jacobians(function, leaves)
    expected = applied(jacobian, tangents)
    value, tangent = jvp(function, tuple(leaves), tuple(tangents))
    torch.testing.assert_close((value, tangent), (function(*leaves), expected))
    with forward_ad.dual_level():
        pairs = zip(leaves, tangents, strict=True)
        output = function(*(forward_ad.make_dual(x, t) for x, t in pairs))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)
    torch.testing.assert_close(jacfwd(function, tuple(range(6)))(*leaves), tuple(jacobian))


@pytest.mark.parametrize(("transform", "kind"), FORMS)
def test_reverse_mode_of_torch_func(transform: str, kind: str, seed: int) -> None:
    function, leaves, every = function_of(transform, kind, None), leaves_of(seed), tuple(range(6))
    jacobian = jacobians(function, leaves)
    torch.testing.assert_close(jacrev(function, every)(*leaves), tuple(jacobian))

    def total(*tensors: Tensor) -> Tensor:
        return function(*tensors).sum()

    sums = summed(jacobian, leaves)
    torch.testing.assert_close(grad(total, every)(*leaves), sums)
    two = [torch.stack([x, x]) for x in leaves]
    expected = tuple(torch.stack([g, g]) for g in sums)
    torch.testing.assert_close(vmap(grad(total, every))(*two), expected)


@pytest.mark.parametrize(("transform", "kind"), FORMS)
def test_second_derivatives(transform: str, kind: str, fused: str, seed: int) -> None:
    """`torch.func` and the reference have second derivatives. Fused backends refuse them in words."""
    leaves = [t.requires_grad_() for t in leaves_of(seed)]
    direction = torch.randn(B, d, dtype=f64)

    def gradient(backend: str | None, leaves: list[Tensor]) -> Tensor:
        output = function_of(transform, kind, backend)(*leaves)
        return torch.autograd.grad(output.sum(), leaves[0], create_graph=True)[0]

    with pytest.raises(NotImplementedError, match="second derivatives use backend='reference'"):
        gradient(fused, leaves).sum().backward()
    expected = torch.autograd.grad((gradient("reference", leaves) * direction).sum(), leaves[0])[0]
    x, *rest = (t.detach() for t in leaves)
    second = hessian(lambda x: function_of(transform, kind, None)(x, *rest).sum())(x)
    torch.testing.assert_close((second * direction).sum((2, 3)), expected)
    # Against a difference quotient of first derivatives, whose error is of order step².
    step = 1e-5
    sides = [
        gradient("reference", [(x + s * step * direction).requires_grad_(), *rest]).detach() for s in (1, -1)
    ]
    torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("transform", "kind"), FORMS)
def test_batched_gradients(transform: str, kind: str, fused: str, seed: int) -> None:
    function, leaves = function_of(transform, kind, fused), leaves_of(seed)
    jacobian = jacobians(function, leaves)
    leaves = [t.requires_grad_() for t in leaves]
    output = function(*leaves)
    units = torch.eye(output.numel(), dtype=f64).reshape(-1, *output.shape)
    used = leaves[: 4 if kind == "logits" else 6]
    batched = torch.autograd.grad(output, used, units, is_grads_batched=True, retain_graph=True)
    rows = zip(jacobian, used, strict=False)
    torch.testing.assert_close(batched, tuple(j.reshape(-1, *x.shape) for j, x in rows))
    # The stash of the CPU is still there: a backward after the batched one is right.
    once = torch.autograd.grad(output.sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(once, summed(jacobian, leaves))


@pytest.mark.parametrize(("transform", "kind"), FORMS)
def test_vmap_of_a_fused_backend(transform: str, kind: str, fused: str, seed: int) -> None:
    """Values and gradients of stacked tensors are those of a loop."""
    function = function_of(transform, kind, fused)
    stacked = [
        torch.stack(p).requires_grad_() for p in zip(leaves_of(seed), leaves_of(seed + 1), strict=True)
    ]
    looped = torch.stack([function(*(x[i] for x in stacked)) for i in range(2)])
    output = vmap(function)(*stacked)
    torch.testing.assert_close(output, looped)
    sums = [torch.autograd.grad(y.square().sum(), stacked, materialize_grads=True) for y in (output, looped)]
    torch.testing.assert_close(sums[0], sums[1])


def test_vmap_over_targets(backend: str, seed: int) -> None:
    x, w, delta, tau, *_ = leaves_of(seed)
    targets = torch.tensor([[0, 2, 5], [1, -100, 3]])

    def loss(target: Tensor) -> Tensor:
        value = gistops.constellation_cross_entropy(x, w, delta, tau, target, backend=backend)
        assert isinstance(value, Tensor)
        return value

    torch.testing.assert_close(vmap(loss)(targets), torch.stack([loss(t) for t in targets]))


@pytest.mark.parametrize("kind", ["logits", "loss"])
def test_a_fused_backend_by_name_is_refused(kind: str, fused: str, seed: int) -> None:
    leaves = leaves_of(seed)
    function = function_of("translation", kind, fused)
    refused = rf"backend: expected None or 'reference' inside .*, got '{fused}'"
    with pytest.raises(NotImplementedError, match=refused):
        jvp(function, tuple(leaves), tuple(leaves))
    with pytest.raises(NotImplementedError, match=refused):
        grad(lambda *t: function(*t).sum())(*leaves)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refused):
        function(*leaves)


def test_topk_in_forward_mode(seed: int) -> None:
    x, w, delta, tau, *_ = leaves_of(seed)

    def values(x: Tensor) -> Tensor:
        return gistops.constellation_topk(x, w, delta, tau, 2)[0]

    def expected(x: Tensor) -> Tensor:
        logits = gistops.constellation_logits(x, w, delta, tau, backend="reference")
        return logits.topk(2, dim=1).values

    tangents = torch.ones_like(x)
    torch.testing.assert_close(jvp(values, (x,), (tangents,)), jvp(expected, (x,), (tangents,)))


def test_an_ensemble_of_heads(seed: int) -> None:
    heads = [ConstellationClassifier(d, K, 2, dtype=f64) for _ in range(3)]
    parameters, buffers = stack_module_state(heads)  # type: ignore[arg-type]
    x = torch.randn(B, d, dtype=f64)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(heads[0], (parameters, buffers), x)
        return output

    output = vmap(call)(parameters, buffers)
    torch.testing.assert_close(output, torch.stack([head(x) for head in heads]))
    output.square().sum().backward()
    for head in heads:
        head(x).square().sum().backward()
    torch.testing.assert_close(
        parameters["centers"].grad, torch.stack([h.centers.grad for h in heads if h.centers.grad is not None])
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_in_forward_mode(frozen: bool, seed: int) -> None:
    head: nn.Module = ConstellationClassifier(d, K, 2, dtype=f64).requires_grad_(False)
    x, t = torch.randn(2, B, d, dtype=f64)
    jacobian = jacobians(head, [x])
    if frozen:
        head.freeze()  # type: ignore[operator]
    torch.testing.assert_close(jvp(head, (x,), (t,))[1], applied(jacobian, [t]))
