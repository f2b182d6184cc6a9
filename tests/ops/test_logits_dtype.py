"""Logits in the dtype of input: the wide logits rounded once, and gradients from the rounded logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gistops

from .oracle import (
    Sample,
    allowed,
    allowed_of_tau,
    error,
    errors_of_rounded_logits,
    generator,
    gradients,
    leaves,
    operators,
    routed,
)

half, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: Odd sizes, larger than the tiles; mixed dtypes of operands, which are converted; a float64 operand.
NARROW = [
    Sample(261, 1043, 37, 4, bf16, bf16, bf16),
    Sample(37, 531, 20, 4, half, half, half),
    Sample(33, 70, 16, 0, bf16, bf16, bf16),
    Sample(35, 71, 17, 9, bf16, bf16, bf16, spread=1.0),
    Sample(67, 129, 40, 3, bf16, f32, f32),
    Sample(19, 33, 40, 3, half, f64, f32),
]
IDS = [s.id for s in NARROW]
TRANSFORMS = ("translation", "rotation", "mlp", "subcenters")


def call(
    transform: str, seed: int, requires_grad: bool, backend: str, **options: Any
) -> tuple[Any, list[Tensor]]:
    """Return the result of a transform on bfloat16 tensors, and the tensors."""
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(bf16).requires_grad_(requires_grad)

    x, tau = normal(13, 24), torch.tensor(8.0).requires_grad_(requires_grad)
    if transform == "subcenters":
        centers = normal(131, 3, 24)
        return gistops.subcenter_logits(x, centers, tau, backend=backend, **options), [x, centers, tau]
    centers, displacements = normal(131, 24), normal(3, 24)
    tensors, more = [x, centers, displacements, tau], {}
    if transform == "rotation":
        more = {"axis": normal(24)}
    if transform == "mlp":
        more = {"mlp": (normal(5, 48), normal(24, 5))}
    logits = gistops.constellation_logits(*tensors, transform=transform, backend=backend, **more, **options)  # type: ignore[call-overload]
    return logits, [*tensors, *(more["mlp"] if "mlp" in more else more.values())]


@pytest.mark.parametrize("sample", NARROW, ids=IDS)
@pytest.mark.parametrize("return_slots", [False, True])
def test_narrow_logits_are_the_wide_logits_rounded_once(
    sample: Sample, return_slots: bool, backend: str, seed: int
) -> None:
    tensors = sample.tensors(seed, requires_grad=False)
    options: dict[str, Any] = {"return_slots": return_slots, "backend": backend}
    wide = gistops.constellation_logits(*tensors, **options)
    narrow = gistops.constellation_logits(*tensors, logits_dtype=sample.input, **options)
    if return_slots:
        assert torch.equal(narrow[1], wide[1])
        wide, narrow = wide[0], narrow[0]
    assert narrow.dtype == sample.input
    assert torch.equal(narrow, wide.to(sample.input))


@pytest.mark.parametrize("sample", NARROW, ids=IDS)
def test_gradients(sample: Sample, backend: str, seed: int) -> None:
    """The terms in which the backward reads the rounded logits have their relative error, and nothing else has."""
    tensors = sample.tensors(seed)
    grad = torch.randn(sample.B, sample.K, generator=generator(seed + 1)).to(sample.input)
    logits, slots = gistops.constellation_logits(
        *tensors, return_slots=True, logits_dtype=sample.input, backend=backend
    )
    ours = torch.autograd.grad(logits, tensors, grad)
    wide = leaves(tensors, f64)
    truth = gradients(lambda *t: routed(*t, slots), wide, grad.double())
    rounded = errors_of_rounded_logits(wide, slots, logits, grad)
    for name, tensor, value, true, more in zip(
        ("input", "centers", "displacements", "tau"), tensors, ours, truth, rounded, strict=True
    ):
        dtype = max(tensor.dtype, f32, key=lambda dtype: torch.finfo(dtype).eps)
        bound = allowed(0.0, true, dtype, max(sample.B, sample.K))
        if name == "tau":
            bound = allowed_of_tau(grad, logits, tensor, true, f32)
        assert value.dtype == tensor.dtype
        assert error(value, true) <= bound + more, name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform(transform: str, backend: str, seed: int) -> None:
    wide, wide_tensors = call(transform, seed, True, backend)
    narrow, tensors = call(transform, seed, True, backend, logits_dtype=bf16)
    assert narrow.dtype == bf16
    assert torch.equal(narrow, wide.to(bf16))
    grad = torch.randn(wide.shape, generator=generator(seed + 1)).to(bf16)
    ours = torch.autograd.grad(narrow, tensors, grad)
    expected = torch.autograd.grad(wide, wide_tensors, grad.float())
    for value, true in zip(ours, expected, strict=True):
        # The size of a sum's terms is not known here: the norm of the whole gradient stands for it.
        assert error(value, true) <= 4 * torch.finfo(bf16).eps * float(
            true.double().norm() + grad.double().norm()
        )


@pytest.mark.parametrize("transform", ["translation", "subcenters"])
def test_a_vmap(transform: str, fused: str, seed: int) -> None:
    x = torch.randn(3, 5, 24, generator=generator(seed)).to(bf16).requires_grad_()
    function: Any = gistops.subcenter_logits if transform == "subcenters" else gistops.constellation_logits
    _, (_, *rest) = call(transform, seed, False, fused)

    def logits(x: Tensor) -> Tensor:
        return function(x, *rest, backend=fused, logits_dtype=bf16)

    outputs, expected = torch.vmap(logits)(x), torch.stack([logits(sample) for sample in x])
    assert torch.equal(outputs, expected)
    grad = torch.randn_like(outputs)
    values = (torch.autograd.grad(output, x, grad)[0] for output in (outputs, expected))
    assert torch.equal(*values)


def test_dtypes_that_are_not_offered(backend: str) -> None:
    x, w, delta = torch.ones(2, 4, dtype=half), torch.ones(3, 4), torch.ones(1, 4)
    for logits in (
        lambda dtype: gistops.constellation_logits(x, w, delta, 8.0, logits_dtype=dtype, backend=backend),
        lambda dtype: gistops.subcenter_logits(x, w[:, None], 8.0, logits_dtype=dtype, backend=backend),
    ):
        for dtype in (f32, half):
            assert logits(dtype).dtype == dtype
        for dtype in (bf16, f64, torch.int32):
            message = rf"logits_dtype: expected None, torch.float32 or, as input, torch.float16, got {dtype}"
            with pytest.raises(ValueError, match=message):
                logits(dtype)
        with pytest.raises(TypeError, match=r"logits_dtype: expected None or a torch.dtype, got str"):
            logits("float16")
    with pytest.raises(ValueError, match=r"logits_dtype: expected None, torch.float32, got torch.bfloat16"):
        gistops.constellation_logits(x.float(), w, delta, 8.0, logits_dtype=bf16, backend=backend)


def test_autocast(backend: str, device: str, seed: int) -> None:
    """Inside autocast the narrow dtype is that of autocast, except for float64."""
    x, w, delta, tau = Sample(7, 9, 12, 2).tensors(seed, requires_grad=False)
    with torch.autocast(device, dtype=bf16):
        wide = gistops.constellation_logits(x, w, delta, tau, backend=backend)
        narrow = gistops.constellation_logits(x, w, delta, tau, logits_dtype=bf16, backend=backend)
        assert torch.equal(narrow, wide.to(bf16))
        with pytest.raises(ValueError, match=r"or, as input, torch.bfloat16, got torch.float16"):
            gistops.constellation_logits(x.half(), w, delta, tau, logits_dtype=half, backend=backend)
        with pytest.raises(ValueError, match=r"expected None, torch.float64, got torch.bfloat16"):
            gistops.constellation_logits(x.double(), w, delta, tau, logits_dtype=bf16, backend=backend)


@pytest.mark.parametrize(
    "head", [gistops.nn.ConstellationClassifier(20, 33, 2), gistops.nn.SubcenterClassifier(20, 33)]
)
def test_heads_and_frozen_heads(head: Any, device: str, seed: int) -> None:
    head = head.to(device)
    x = torch.randn(11, 20, generator=generator(seed)).to(bf16)
    for module in (head, head.freeze()):
        logits, slots = module(x, return_slots=True, logits_dtype=bf16)
        assert torch.equal(logits, head(x).to(bf16))
        assert torch.equal(slots, head(x, return_slots=True)[1])
        assert torch.equal(module(x, logits_dtype=bf16), logits)


class Narrow(nn.Module):
    def __init__(self, seed: int, backend: str) -> None:
        super().__init__()
        _, *parameters = Sample(37, 67, 20, 4, bf16, bf16, bf16).tensors(seed, requires_grad=False)
        self.centers, self.displacements, self.tau = (nn.Parameter(p) for p in parameters)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.centers, self.displacements, self.tau)
        return gistops.constellation_logits(*tensors, logits_dtype=x.dtype, backend=self.backend)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool, fused: str, seed: int) -> None:
    torch._dynamo.reset()
    head = Narrow(seed, fused)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (37, 12):
        x = torch.randn(rows, 20).to(bf16).requires_grad_()
        grad = torch.randn(rows, 67).to(bf16)
        inputs = [x, *head.parameters()]
        assert torch.equal(compiled(x), head(x))
        for value, expected in zip(
            torch.autograd.grad(compiled(x), inputs, grad),
            torch.autograd.grad(head(x), inputs, grad),
            strict=True,
        ):
            assert torch.equal(value, expected)


def test_export(fused: str, seed: int) -> None:
    head = Narrow(seed, fused).eval()
    x = torch.randn(11, 20).to(bf16)
    program = torch.export.export(head, (x,))
    assert torch.equal(program.module()(x), head(x))


@pytest.mark.parametrize("sample", NARROW[1:], ids=IDS[1:])
def test_opcheck(sample: Sample, fused: str, seed: int) -> None:
    tensors = sample.tensors(seed)
    forward, backward = operators(fused)
    options = (False, True, sample.input)
    torch.library.opcheck(forward, (*tensors, *options))
    with torch.no_grad():
        saved = forward(*tensors, *options)
    grad = torch.randn(saved[0].shape).to(saved[0].dtype)
    frozen = [t.detach() for t in tensors]
    torch.library.opcheck(backward, (grad, *frozen, *saved, True, True, True, True))
