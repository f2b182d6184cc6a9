"""Gradients in half precision: sums in float32, rounded once; and the dtype of the logits."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops._classifier import MarginKind, Transform
from gistops.backends import eager_loss, reference

from .oracle import error, generator

half, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CLASSES, DIMS = 5, 24


def tensors(transform: str, margin: bool, dtype: torch.dtype, rows: int, seed: int) -> dict[str, Tensor]:
    """Return the differentiable arguments of a loss, by name."""
    source = generator(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=source) * scale

    named = {
        "input": normal(rows, DIMS),
        "centers": normal(CLASSES, DIMS),
        "displacements": normal(3, DIMS, scale=0.5),
        "tau": torch.tensor(8.0),
        "class_bias": normal(CLASSES, scale=0.3),
    }
    if transform == "rotation":
        named["axis"] = normal(DIMS)
    if transform == "mlp":
        named |= {"first": normal(7, 2 * DIMS, scale=0.3), "second": normal(DIMS, 7)}
    if margin:
        named["margin"] = torch.rand(CLASSES, generator=source) * 0.3
    return {name: x.to(dtype) for name, x in named.items()}


def call(named: dict[str, Tensor], transform: str, kind: str | None, target: Tensor, backend: str) -> Tensor:
    """Return the sum of the losses."""
    named = dict(named)
    first, second = named.pop("first", None), named.pop("second", None)
    more: dict[str, Any] = {"mlp": (first, second)} if first is not None else {}
    loss: Any = gistops.constellation_cross_entropy(
        **named, **more, target=target, transform=transform, margin_kind=kind or "logit", reduction="sum", backend=backend
    )  # type: ignore[arg-type]  # fmt: skip
    return loss


def gradients(
    named: dict[str, Tensor],
    transform: str,
    kind: str | None,
    target: Tensor,
    backend: str,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items()}
    loss = call(leaves, transform, kind, target, backend)
    return dict(
        zip(
            leaves,
            torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, scale)),
            strict=True,
        )
    )


def vectors_of(named: dict[str, Tensor], transform: str) -> Tensor | None:
    """Return the vectors [K, M, d] of translations and rotations in float64; None for networks."""
    centers, displacements = named["centers"].double(), named["displacements"].double()
    if transform == "translation":
        return centers[:, None] + F.pad(displacements, (0, 0, 1, 0))
    if transform == "rotation":
        matrices = (reference.rotation(named["axis"].double(), delta) for delta in displacements)
        return torch.stack([centers, *(centers + centers @ turn.T for turn in matrices)], 1)
    return None


def without_near_ties(named: dict[str, Tensor], transform: str) -> dict[str, Tensor]:
    """Return the tensors without the rows in which the best two slots of a class are nearly equal.

    There, a GPU may choose different slots in float32 and in half precision, whose sums have different orders.
    """
    vectors = vectors_of(named, transform)
    if vectors is None:
        return named
    cosines = torch.einsum("bd,kmd->bkm", F.normalize(named["input"].double()), F.normalize(vectors, dim=2))
    gaps = -cosines.topk(2, dim=2).values.diff(dim=2)
    return named | {"input": named["input"][gaps.flatten(1).amin(1) > 1e-5]}


def rounds_weights(transform: str, dtype: torch.dtype, backend: str) -> bool:
    """Return True if the backend rounds the weights of its products: on GPUs, and on CPUs with units for bfloat16."""
    if backend == "cpu":
        return transform != "mlp" and dtype == bf16 and torch.ops.gistops.cpu_multiplies(dtype)
    return transform in eager_loss.WHOLE_LOSS.get(backend, ())


def rounded_weights(named: dict[str, Tensor], transform: str) -> dict[str, Tensor]:
    """Return bounds of the errors of the gradients of input and centers if the weights of their products are rounded.

    A weight is at most 2 τ / (|f| |w'|) in size, with a margin in angles too. The bounds are those of half an eps of each
    weight, for the sum over the rows as for independent errors, times 8: for the projections, and for the gradients of the
    coefficients of rotations, which are rounded for themselves.
    """
    vectors = vectors_of(named, transform)
    assert vectors is not None
    input, tau = named["input"].double(), float(named["tau"])
    weights = 8 * torch.finfo(named["input"].dtype).eps * tau
    return {
        "input": (weights / input.norm(dim=1, keepdim=True)).to(f32),
        "centers": weights * len(input) ** 0.5 / vectors.norm(dim=2).min().to(f32),
    }


def check_rounded_once(
    transform: str, kind: str | None, dtype: torch.dtype, backend: str, seed: int, rows: int
) -> None:
    """Compare with the gradients of the same numbers in float32: one rounding, and the largest sum's float32 error.

    The signs of the terms are mixed: gradients are much smaller than the sums of their terms' magnitudes, so that a partial
    sum in half precision shows. Where `rounds_weights`, the weights of the products for input and centers are rounded.
    """
    named = without_near_ties(tensors(transform, kind is not None, dtype, rows, seed), transform)
    target = torch.randint(0, CLASSES, (len(named["input"]),), generator=generator(seed + 1))
    made = gradients(named, transform, kind, target, backend)
    wide = gradients({name: x.to(f32) for name, x in named.items()}, transform, kind, target, backend)
    more: dict[str, Tensor] = {}
    if rounds_weights(transform, dtype, backend):
        more = rounded_weights(named, transform)
    for name, gradient in made.items():
        assert gradient.dtype == dtype
        true = wide[name]
        allowed = torch.finfo(dtype).eps * true.abs() + 1e-5 * true.abs().max() + torch.finfo(dtype).tiny
        allowed = allowed + more.get(name, 0.0)
        excess = (gradient.to(f32) - true).abs() - allowed
        assert float(excess.max()) <= 0, (name, float((gradient.to(f32) - true).abs().max()))


@pytest.mark.parametrize("dtype", [bf16, half], ids=str)
@pytest.mark.parametrize("kind", [None, *get_args(MarginKind)])
@pytest.mark.parametrize("transform", get_args(Transform))
def test_gradients_are_rounded_once(
    transform: str, kind: str | None, dtype: torch.dtype, backend: str, seed: int
) -> None:
    check_rounded_once(transform, kind, dtype, backend, seed, rows=4096)


def check_no_overflow_of_partial_sums(transform: str, backend: str, seed: int, rows: int) -> None:
    """Scale the loss so that the largest gradient of each argument in turn just fits into float16."""
    named = tensors(transform, False, half, rows, seed)
    target = torch.randint(0, CLASSES, (rows,), generator=generator(seed + 1))
    wide = gradients({name: x.to(f32) for name, x in named.items()}, transform, None, target, backend)
    for name, true in wide.items():
        scale = 20000 / float(true.abs().max())
        assert gradients(named, transform, None, target, backend, scale)[name].isfinite().all(), name


@pytest.mark.parametrize("transform", ["rotation", "mlp"])
def test_partial_sums_beyond_float16(transform: str, backend: str, seed: int) -> None:
    check_no_overflow_of_partial_sums(transform, backend, seed, rows=256)


def test_a_gradient_of_the_bias_that_cancels(backend: str) -> None:
    """Two classes of equal probability with as many rows each: the terms of each bias, about a million, add up to zero."""
    rows = 4096
    bias = torch.zeros(2, dtype=half, requires_grad=True)
    x, w, delta = torch.zeros(rows, 8), torch.ones(2, 8), torch.ones(1, 8)
    loss: Any = gistops.constellation_cross_entropy(
        x, w, delta, 8.0, torch.arange(rows) % 2, class_bias=bias, reduction="sum", backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, bias, torch.full_like(loss, 1000.0))
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1e-5 * 1000 * rows


def check_float64_anywhere(transform: str, backend: str, seed: int) -> None:
    """The logits are float64, and as precise, if one argument besides tau is float64."""
    named = tensors(transform, False, f32, 6, seed)
    del named["class_bias"]
    target = torch.randint(0, CLASSES, (6,), generator=generator(seed + 1))
    truth = call({name: x.double() for name, x in named.items()}, transform, None, target, "reference")
    for name in named:
        mixed = named | {name: named[name].double()}
        loss = call(mixed, transform, None, target, backend)
        wide = name != "tau"
        assert loss.dtype == (f64 if wide else f32), name
        assert error(loss, truth) <= (1e-11 if wide else 1e-3), name


@pytest.mark.parametrize("transform", get_args(Transform))
def test_float64_in_any_argument(transform: str, backend: str, seed: int) -> None:
    check_float64_anywhere(transform, backend, seed)


def test_a_number_as_tau_has_the_precision_of_the_logits(backend: str) -> None:
    x, w = torch.randn(3, 8, dtype=f64), torch.randn(4, 3, 8, dtype=f64)
    tau = torch.tensor(10.1, dtype=f64)
    centers, delta = w[:, 0], w[0]
    for number, tensor in (
        (gistops.constellation_logits(x, centers, delta, t, backend=backend) for t in (10.1, tau)),
        (gistops.subcenter_logits(x, w, t, backend=backend) for t in (10.1, tau)),
    ):
        assert torch.equal(number, tensor)  # type: ignore[arg-type]
