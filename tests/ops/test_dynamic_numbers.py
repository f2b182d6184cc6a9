"""Numbers that change from call to call share one compiled graph, as in schedules of a temperature or a margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gistops

from .oracle import Sample

B, K = 4, 14
target = torch.arange(B)
MARGINS = [0.05 + 0.11 * i for i in range(20)]
Call = Callable[[list[Tensor], str, Any], Any]


def loss(name: str, **more: Any) -> Call:
    def call(tensors: list[Tensor], backend: str, value: Any) -> Any:
        arguments = {"tau": tensors[3], "target": target, "backend": backend, name: value} | more
        return gistops.constellation_cross_entropy(*tensors[:3], **arguments)

    return call


def topk(tensors: list[Tensor], backend: str, k: int) -> Any:
    return gistops.constellation_topk(*tensors, k, backend=backend)[0]


def logits(tensors: list[Tensor], backend: str, tau: float) -> Any:
    return gistops.constellation_logits(*tensors[:3], tau, backend=backend)


CASES: dict[str, tuple[Call, Sequence[Any]]] = {
    "tau": (logits, [1.5 + i for i in range(20)]),
    "tau of a loss": (loss("tau"), [1.5 + i for i in range(20)]),
    "logit margin": (loss("margin"), MARGINS),
    "cosine margin": (loss("margin", margin_kind="cosine"), MARGINS),
    "angle margin": (loss("margin", margin_kind="angle"), MARGINS),
    "label_smoothing": (loss("label_smoothing"), [0.04 * i + 0.01 for i in range(20)]),
    "ignore_index": (loss("ignore_index"), [-100, -7, *range(2, 20)]),
    "k": (topk, range(2, K)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_all_values(name: str, fused: str, device: str, seed: int) -> None:
    """The first value makes a graph of its own, the second one a graph for all others."""
    (call, values), graphs = CASES[name], 2
    if name == "label_smoothing" and device == "cuda":
        values, graphs = values[:4], 4  # each value has a graph, as documented
    tensors = Sample(B, K, 6, 2).tensors(seed)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda value: call(tensors, fused, value), backend=counter, fullgraph=True)
    for value in values:
        torch.testing.assert_close(compiled(value), call(tensors, fused, value), atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= graphs
