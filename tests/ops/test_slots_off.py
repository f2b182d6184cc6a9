"""Slots are written only if they are returned or a gradient can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gistops
from gistops import backends

from .oracle import Sample, generator, operators
from .test_logits_dtype import TRANSFORMS, call

SAMPLE = Sample(37, 131, 20, 4)


class Slots(TorchDispatchMode):
    """Records the shapes of the slots that forward ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if "gistops" in str(function) and "forward" in str(function):
            self.shapes.append(list(output[1].shape))
        return output


def shapes_of_slots(function: Callable[[], Any]) -> list[list[int]]:
    with Slots() as slots:
        function()
    return slots.shapes


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_slots_that_nobody_can_ask_for(transform: str, fused: str, seed: int) -> None:
    def shapes(requires_grad: bool, **options: Any) -> set[tuple[int, ...]]:
        found = shapes_of_slots(lambda: call(transform, seed, requires_grad, fused, **options))
        return set(map(tuple, found))

    assert shapes(requires_grad=False) == {(0,)}
    assert shapes(requires_grad=False, return_slots=True) == {(13, 131)}
    assert shapes(requires_grad=True) == {(13, 131)}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert shapes(requires_grad=True) == {(0,)}
            assert shapes(requires_grad=True, return_slots=True) == {(13, 131)}


@pytest.mark.parametrize("i", range(4))
def test_one_tensor_that_requires_a_gradient_is_enough(i: int, fused: str, seed: int) -> None:
    tensors = SAMPLE.tensors(seed, requires_grad=False)
    tensors[i].requires_grad_()
    logits = gistops.constellation_logits(*tensors, backend=fused)
    (value,) = torch.autograd.grad(logits.sum(), tensors[i])
    assert value.isfinite().all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_logits_have_the_same_bits(transform: str, fused: str, seed: int) -> None:
    with_slots = call(transform, seed, False, fused, return_slots=True)[0][0]
    assert torch.equal(call(transform, seed, False, fused)[0], with_slots)


def test_classes_with_a_cancelled_pair_have_the_same_bits(fused: str, seed: int) -> None:
    tensors = SAMPLE.tensors(seed, requires_grad=False)
    tensors[1][7:90] = -tensors[2][1] + 1e-6 * tensors[1][7:90]
    tensors[0][3] = torch.nan
    logits, slots = gistops.constellation_logits(*tensors, return_slots=True, backend=fused)
    assert (slots[:, 7:90] == 2).any(), "expected the cancelled slot to win somewhere"
    assert torch.equal(
        gistops.constellation_logits(*tensors, backend=fused).nan_to_num(7), logits.nan_to_num(7)
    )


def test_an_op_without_slots_has_no_gradient(fused: str, seed: int) -> None:
    forward, backward = operators(fused)
    tensors = SAMPLE.tensors(seed)
    output = forward(*tensors, False, False)
    assert output[1].shape == (0,)
    with pytest.raises(RuntimeError, match="need_slots: expected True where a gradient is needed, got False"):
        output[0].sum().backward()
    grad, detached = torch.ones_like(output[0]), [t.detach() for t in tensors]
    with pytest.raises(RuntimeError, match="slots: expected"):
        backward(grad, *detached, *(x.detach() for x in output), True, True, True, True)


def test_opcheck(fused: str, seed: int) -> None:
    forward, _ = operators(fused)
    tensors = SAMPLE.tensors(seed, requires_grad=False)
    torch.library.opcheck(forward, (*tensors, False, False))
    ops = backends.ops(fused)
    centers = torch.randn(131, 3, 20, generator=generator(seed))
    torch.library.opcheck(ops.subcenter_forward.default, (tensors[0], centers, tensors[3], False, False))
    turns = torch.randn(3, 20), torch.randn(3, 2)
    torch.library.opcheck(
        ops.rotation_forward.default, (tensors[0], tensors[1], tensors[3], *turns, False, False)
    )


def test_calls_of_earlier_programs(fused: str, seed: int) -> None:
    """The arguments of the ops before there were `need_slots` and `logits_dtype`."""
    forward, _ = operators(fused)
    tensors = SAMPLE.tensors(seed, requires_grad=False)
    for options in ((), (False,)):
        logits, slots, *_ = forward(*tensors, *options)
        assert logits.shape == slots.shape == (37, 131)


class Head(nn.Module):
    def __init__(self, seed: int, backend: str) -> None:
        super().__init__()
        _, *parameters = SAMPLE.tensors(seed, requires_grad=False)
        self.centers, self.displacements, self.tau = (nn.Parameter(p) for p in parameters)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return gistops.constellation_logits(
            x, self.centers, self.displacements, self.tau, backend=self.backend
        )


def test_a_compiled_function_serves_inference_and_training(fused: str, seed: int) -> None:
    torch._dynamo.reset()
    head = Head(seed, fused)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20)
    with torch.no_grad():
        assert torch.equal(compiled(x), head(x))
    for value, expected in zip(
        torch.autograd.grad(compiled(x).sum(), list(head.parameters())),
        torch.autograd.grad(head(x).sum(), list(head.parameters())),
        strict=True,
    ):
        assert torch.equal(value, expected)


def test_a_program_that_was_exported_without_gradients(fused: str, seed: int) -> None:
    head = Head(seed, fused)
    x = torch.randn(5, 20)
    with torch.no_grad():
        program = torch.export.export(head, (x,))
    logits = program.module()(x)
    assert torch.equal(logits, head(x))
    with pytest.raises(RuntimeError, match="need_slots: expected True where a gradient is needed, got False"):
        logits.sum().backward()


def test_a_vmap_hides_that_a_tensor_requires_a_gradient(fused: str, seed: int) -> None:
    _, w, delta, tau = SAMPLE.tensors(seed, requires_grad=False)
    x = torch.randn(3, 5, 20, generator=generator(seed), requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return gistops.constellation_logits(x, w, delta, tau, backend=fused)

    (value,) = torch.autograd.grad(torch.vmap(logits)(x).sum(), x)
    (expected,) = torch.autograd.grad(logits(x).sum(), x)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "head", [gistops.nn.ConstellationClassifier(20, 33, 2), gistops.nn.SubcenterClassifier(20, 33)]
)
def test_frozen_heads(head: Any, seed: int) -> None:
    frozen, x = head.freeze(), torch.randn(11, 20, generator=generator(seed))
    shapes: list[Any] = []

    class Frozen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **kwargs or {})
            if "frozen_logits" in str(function):
                shapes.append(tuple(output[1].shape))
            return output

    with Frozen():
        logits = frozen(x)
        frozen(x, return_slots=True)
    assert shapes == [(0,), (11, 33)]
    assert torch.equal(logits, head(x))
