"""Ops copy nothing between host and device, which would make the host wait for a GPU.

The tests use meta tensors, whose values cannot be read, and refuse functions that copy from the host. On a GPU, torch
raises an error where the host waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import gistops

from ..one_device import OneDevice
from .oracle import Sample

K, d, m = 67, 20, 3
Tensors = tuple[Tensor, ...]  # x, w, δ, u, A, B, sub-centers, one number per class, target


def tensors_of(seed: int, requires_grad: bool = True) -> Tensors:
    x, w, delta, _ = Sample(37, K, d, m).tensors(seed, requires_grad=False)
    more = (torch.randn(d), torch.randn(5, 2 * d), torch.randn(d, 5), torch.randn(K, 3, d), torch.rand(K))
    floats = [t.requires_grad_(requires_grad) for t in (x, w, delta, *more)]
    return *floats, torch.arange(37)


def bare(call: Callable[..., Any], **more: Any) -> Callable[[Tensors, str], Any]:
    return lambda t, backend: call(t[0], t[1], t[2], 16.0, backend=backend, **more)


def loss(**more: Any) -> Callable[[Tensors, str], Any]:
    def call(t: Tensors, backend: str) -> Any:
        options = {"class_bias": t[7], "weight": t[7].detach(), "label_smoothing": 0.1} | more
        if options.get("margin") is Tensor:
            options["margin"] = t[7]
        arguments = (*t[:3], 16.0, t[8])
        return gistops.constellation_cross_entropy(*arguments, return_lse=True, backend=backend, **options)

    return call


def transformed(name: str) -> Callable[[Tensors, str], Any]:
    def call(t: Tensors, backend: str) -> Any:
        extra = {"axis": t[3]} if name == "rotation" else {"mlp": (t[4], t[5])}
        more: Any = {"transform": name, "backend": backend, **extra}
        logits = gistops.constellation_logits(*t[:3], 16.0, **more)
        with torch.no_grad():
            gistops.constellation_topk(*t[:3], 16.0, 5, **more)
        return logits, gistops.constellation_cross_entropy(*t[:3], 16.0, t[8], margin=0.1, **more)

    return call


#: Every public function, and every argument that may be a number instead of a tensor.
CALLS: dict[str, Callable[[Tensors, str], Any]] = {
    "logits": bare(gistops.constellation_logits),
    "subcenter logits": lambda t, backend: gistops.subcenter_logits(t[0], t[6], 16, backend=backend),
    "loss": loss(),
    "margin logit": loss(margin=0.3),
    "margin cosine": loss(margin=1, margin_kind="cosine"),
    "margin angle": loss(margin=0.3, margin_kind="angle", reduction="sum"),
    "margin per class": loss(margin=Tensor, reduction="none"),
    "subcenter loss": lambda t, backend: gistops.subcenter_cross_entropy(
        t[0], t[6], 16.0, t[8], margin=0.5, margin_kind="angle", backend=backend
    ),
    "topk": lambda t, backend: gistops.constellation_topk(
        *t[:3], 16.0, 5, class_bias=t[7], return_lse=True, backend=backend
    ),
    "subcenter topk": lambda t, backend: gistops.subcenter_topk(t[0], t[6], 16.0, 5, backend=backend),
    "rotation": transformed("rotation"),
    "mlp": transformed("mlp"),
}


def backward(made: Any) -> None:
    losses = [t.sum() for t in tree_leaves(made) if t.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()


class FromTheHost(TorchFunctionMode):
    """A mode that refuses to make tensors from values on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_no_value_comes_from_the_host_or_is_read_by_it(name: str, backend: str, seed: int) -> None:
    tensors = tuple(t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors_of(seed))
    with torch.device("meta"), FromTheHost(), OneDevice():
        backward(CALLS[name](tensors, backend))
    assert "topk" in name or tensors[0].grad is not None


@pytest.mark.parametrize("computed", [False, True])
def test_classes_are_drawn_on_the_device(computed: bool, backend: str, seed: int) -> None:
    x, w, delta, *_, bias, target = (
        t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors_of(seed)
    )
    with torch.device("meta"), FromTheHost(), OneDevice():
        centers = w * 1 if computed else w  # the gradient of a parameter is sparse
        options: Any = {"class_bias": bias, "sample_negatives": 0.5, "backend": backend}
        backward(gistops.constellation_cross_entropy(x, centers, delta, 16.0, target, **options))
    assert w.grad is not None
    assert w.grad.is_sparse != computed


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """A context in which torch raises an error if the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CALLS)
def test_the_host_never_waits_for_the_gpu(name: str, fused: str, seed: int) -> None:
    tensors = tensors_of(seed)
    backward(CALLS[name](tensors, fused))  # the first call may compile, and wait
    with refusing_to_wait():
        backward(CALLS[name](tensors, fused))
