"""One rule for the options of all functions: numbers of Python and numpy, and tensors of the documented shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gistops

from .oracle import Sample

B, K = 6, 12
target = torch.arange(B)
nan, inf = math.nan, math.inf
NUMBERS: dict[str, list[Any]] = {
    "tau": [8, 8.0, np.float32(8), np.float64(8), np.int64(8), torch.tensor(8.0), torch.tensor([[8.0]])],
    "margin": [1, 1.0, np.float16(1), np.int32(1), torch.tensor(1.0), torch.ones(K, dtype=torch.float64)],
    "label_smoothing": [1, 1.0, np.float32(1), np.uint8(1)],
    "ignore_index": [3, np.int64(3), np.uint8(3)],
}


def read(*case: Any) -> Any:
    """Return a case of values that are read, and so found, on the CPU alone."""
    return pytest.param(*case, marks=pytest.mark.cpu)


REFUSED: list[Any] = [
    ("tau", np.full(1, 8.0), TypeError, "tensor of one element or a finite number above 0, got ndarray"),
    ("tau", [8.0], TypeError, "tensor of one element or a finite number above 0, got list"),
    ("tau", None, TypeError, "tensor of one element or a finite number above 0, got NoneType"),
    ("tau", np.bool_(True), TypeError, "tensor of one element or a finite number above 0, got bool"),
    ("tau", 8j, TypeError, "tensor of one element or a finite number above 0, got complex"),
    ("tau", 0, ValueError, "got 0"),
    ("tau", -1.0, ValueError, r"got -1\.0"),
    ("tau", nan, ValueError, "got nan"),
    ("tau", inf, ValueError, "got inf"),
    ("tau", 10**400, ValueError, "got 1000"),
    ("tau", np.float32(nan), ValueError, "got nan"),
    read("tau", torch.tensor(0.0), ValueError, r"a value above 0, got 0\.0"),
    read("tau", torch.tensor([-2.0]), ValueError, r"a value above 0, got -2\.0"),
    ("margin", np.zeros((K, 1)), TypeError, "a tensor or a finite number, got ndarray"),
    ("margin", np.array(1.0), TypeError, "a tensor or a finite number, got ndarray"),
    ("margin", [0.0] * (K + 3), TypeError, "a tensor or a finite number, got list"),
    ("margin", "1", TypeError, "a tensor or a finite number, got str"),
    ("margin", nan, ValueError, "a tensor or a finite number, got nan"),
    ("margin", torch.zeros(K, 1), ValueError, r"shape \[12\], .* got \[12, 1\]"),
    ("margin", torch.zeros(1), ValueError, r"shape \[12\], .* got \[1\]"),
    ("margin", torch.tensor(1), TypeError, "float32, float16, bfloat16 or float64, got torch.int64"),
    ("margin", torch.tensor(1.0, device="meta"), ValueError, "device .*, got meta"),
    ("class_bias", np.zeros(K), TypeError, "a torch.Tensor, got ndarray"),
    ("class_bias", 0.5, TypeError, "a torch.Tensor, got float"),
    ("weight", [1.0] * K, TypeError, "a torch.Tensor, got list"),
    read("weight", torch.tensor([1.0] * 7 + [-0.5] + [1.0] * 4), ValueError, r"no negative value, got -0\.5 at class 7"),
    ("label_smoothing", None, TypeError, "a number from 0 to 1, got NoneType"),
    ("label_smoothing", torch.tensor(0.1), TypeError, "a number from 0 to 1, got Tensor"),
    ("label_smoothing", True, TypeError, "a number from 0 to 1, got bool"),
    ("label_smoothing", nan, ValueError, "a number from 0 to 1, got nan"),
    ("label_smoothing", -0.1, ValueError, r"a number from 0 to 1, got -0\.1"),
    ("ignore_index", None, TypeError, "an integer .*, got None"),
    ("ignore_index", torch.tensor(3), TypeError, "an integer .*, got tensor"),
    ("ignore_index", True, TypeError, "an integer .*, got True"),
    ("ignore_index", 2**63, ValueError, "an integer from .*, got 9223372036854775808"),
    ("reduction", None, ValueError, "one of 'mean', 'sum', 'none', got None"),
    ("reduction", np.zeros(2), ValueError, "one of 'mean', 'sum', 'none', got array"),
    ("margin_kind", ["logit"], ValueError, r"one of 'logit', 'cosine', 'angle', got \['logit'\]"),
]  # fmt: skip
ANGLES = [-0.1, math.pi + 0.1, 1e9, nan, -inf]


def loss(tensors: list[Tensor], backend: str, **options: Any) -> Tensor:
    arguments: dict[str, Any] = {"tau": tensors[3], "target": target, "backend": backend} | options
    value = gistops.constellation_cross_entropy(*tensors[:3], **arguments)
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("name", NUMBERS)
def test_all_kinds_of_numbers_are_the_same(name: str, backend: str, seed: int) -> None:
    tensors = Sample(B, K, 20, 2).tensors(seed, requires_grad=False)
    values = [loss(tensors, backend, **{name: value}) for value in NUMBERS[name]]
    assert all(torch.equal(value, values[0]) for value in values)
    assert name == "tau" or not torch.equal(values[0], loss(tensors, backend))


@pytest.mark.parametrize(("name", "value", "kind", "words"), REFUSED, ids=lambda x: str(x)[:24])
def test_what_is_refused_is_named(
    name: str, value: Any, kind: type[Exception], words: str, backend: str, seed: int
) -> None:
    tensors = Sample(B, K, 20, 2).tensors(seed)
    with pytest.raises(kind, match=f"^{name}: expected .*{words}"):
        loss(tensors, backend, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_one_graph_takes_scalars_of_numpy(name: str, fused: str, seed: int) -> None:
    """Options that may be tensors do not break the graph; the others may."""
    tensors = Sample(B, K, 20, 2).tensors(seed, requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=name in ("tau", "margin"), backend="eager")
    for value in NUMBERS[name]:
        if isinstance(value, np.generic):
            made, expected = (call(tensors, fused, **{name: value}) for call in (compiled, loss))
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("angle", ANGLES)
def test_angles_outside_0_to_pi_are_refused(angle: float, backend: str, device: str, seed: int) -> None:
    tensors = Sample(B, K, 20, 2).tensors(seed)
    with pytest.raises(ValueError, match=r"^margin: expected a tensor or a number from 0 to π, got"):
        loss(tensors, backend, margin=angle, margin_kind="angle")
    per_class = torch.full((K,), 0.5)
    per_class[3] = angle
    for tensor in (torch.tensor(angle), per_class):
        if angle == angle and device != "cpu":
            continue  # values on a GPU are not read
        if angle == angle:
            with pytest.raises(ValueError, match=r"^margin: expected angles from 0 to π, got"):
                loss(tensors, backend, margin=tensor, margin_kind="angle")
        else:  # a NaN in a tensor is not hidden
            assert loss(tensors, backend, margin=tensor, margin_kind="angle").isnan()


@pytest.mark.parametrize(
    "margin", [0, math.pi, np.float32(math.pi), torch.tensor(math.pi), torch.full((K,), math.pi)]
)
def test_angles_at_the_bounds(margin: Any, backend: str, seed: int) -> None:
    tensors = Sample(B, K, 20, 2).tensors(seed)
    made = loss(tensors, backend, margin=margin, margin_kind="angle")
    wide = [t.detach().double() for t in tensors]
    number = margin.flatten()[0].item() if isinstance(margin, Tensor) else float(margin)
    true = loss(wide, "reference", margin=min(number, math.pi), margin_kind="angle")
    torch.testing.assert_close(made.double(), true, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("margin", [-20.0, 0.5, 3.0])
def test_cosine_margins_of_any_size(margin: float, backend: str, seed: int) -> None:
    tensors = Sample(B, K, 20, 2).tensors(seed)
    wide = [t.detach().double() for t in tensors]
    true = loss(wide, "reference", margin=margin, margin_kind="cosine")
    for value in (margin, torch.tensor(margin), torch.full((K,), margin)):
        made = loss(tensors, backend, margin=value, margin_kind="cosine")
        torch.testing.assert_close(made.double(), true, atol=1e-4, rtol=1e-5)


def test_all_functions_check_tau_and_k(backend: str, device: str, seed: int) -> None:
    x, w, delta, _ = Sample(B, K, 20, 2).tensors(seed, requires_grad=False)
    subcenters = torch.randn(K, 3, 20)
    bad: list[tuple[Any, type[Exception]]] = [(0.0, ValueError), (np.ones(1), TypeError)]
    if device == "cpu":  # values on a GPU are not read
        bad.append((torch.tensor(-1.0), ValueError))
    for tau, kind in bad:
        for call in (
            lambda tau: gistops.constellation_logits(x, w, delta, tau, backend=backend),
            lambda tau: gistops.constellation_topk(x, w, delta, tau, 2, backend=backend),
            lambda tau: gistops.subcenter_logits(x, subcenters, tau, backend=backend),
            lambda tau: gistops.subcenter_topk(x, subcenters, tau, 2, backend=backend),
            lambda tau: gistops.subcenter_cross_entropy(x, subcenters, tau, target, backend=backend),
        ):
            with pytest.raises(kind, match=r"^tau: expected"):
                call(tau)
    for k in (True, 2.0, np.float32(2), np.ones(1, dtype=np.int64), None):
        with pytest.raises(TypeError, match=r"^k: expected an integer from 1 to 12, got"):
            gistops.constellation_topk(x, w, delta, 4.0, k, backend=backend)
    assert gistops.constellation_topk(x, w, delta, 4.0, np.int32(2), backend=backend)[0].shape == (B, 2)


def test_a_number_keeps_the_digits_of_float64_inputs(backend: str, seed: int) -> None:
    x, w, delta, _ = (t.double() for t in Sample(B, K, 20, 2).tensors(seed, requires_grad=False))
    number = gistops.constellation_logits(x, w, delta, 0.1, backend=backend)
    tensor = gistops.constellation_logits(
        x, w, delta, torch.tensor(0.1, dtype=torch.float64), backend=backend
    )
    assert torch.equal(number, tensor)


def test_values_are_not_read_in_meta_tensors_and_traces(backend: str) -> None:
    """A check that reads a value must not run where there is none, or where the graph would depend on it."""
    with torch.device("meta"):
        x, w, delta, tau = torch.empty(B, 20), torch.empty(K, 20), torch.empty(2, 20), torch.empty(())
        arguments = {"weight": torch.empty(K), "margin": torch.empty(K), "margin_kind": "angle"}
        value = loss([x, w, delta, tau], backend, target=torch.empty(B, dtype=torch.int64), **arguments)
    assert value.is_meta
