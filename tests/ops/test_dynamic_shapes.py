"""Compiled graphs whose sizes are marked as dynamic: one graph serves all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops

#: Dimensions of x, w, δ, bias, A and B.
NAMES = [("B", "d"), ("K", "d"), ("m", "d"), ("K",), ("h", "2d"), ("d", "h")]
#: The sizes that change, by the last letter of their names.
MARKED = "KBd"


def tensors(sizes: dict[str, int]) -> list[Tensor]:
    """Return random tensors of these sizes, with the marked dimensions dynamic."""
    values = [torch.randn([sizes[name] for name in names]) for names in NAMES]
    for value, names in zip(values, NAMES, strict=True):
        for dim, name in enumerate(names):
            if name[-1] in MARKED:
                torch._dynamo.mark_dynamic(value, dim)
    return values


@pytest.mark.parametrize("transform", ["translation", "mlp"])
@pytest.mark.parametrize("kind", ["logits", "topk", "loss"])
def test_one_graph_serves_all_sizes(kind: str, transform: str, backend: str, seed: int) -> None:
    def function(x: Tensor, w: Tensor, delta: Tensor, bias: Tensor, first: Tensor, second: Tensor) -> Any:
        options: dict[str, Any] = {"transform": transform, "backend": backend}
        if transform == "mlp":
            options["mlp"] = first, second
        if kind == "topk":
            return gistops.constellation_topk(x, w, delta, 7.0, 3, class_bias=bias, **options)
        if kind == "loss":
            target = torch.arange(x.shape[0], device=x.device) % 5
            return gistops.constellation_cross_entropy(x, w, delta, 7.0, target, class_bias=bias, **options)
        return gistops.constellation_logits(x, w, delta, 7.0, **options)

    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=count, fullgraph=True)
    for more in (0, 5, 12):
        sizes = {
            name: size + more * (name[-1] in MARKED)
            for name, size in zip("BKdm", (5, 90, 12, 3), strict=True)
        }
        values = tensors(sizes | {"h": 4, "2d": 2 * sizes["d"]})
        torch.testing.assert_close(compiled(*values), function(*values))
    assert len(graphs) == 1


def test_sizes_under_a_default_device(backend: str, device: str, seed: int) -> None:
    """torch 2.11 cannot compile each method of a tensor while a default device is set."""
    with torch.device(device):
        for transform in ("translation", "mlp"):
            test_one_graph_serves_all_sizes("logits", transform, backend, seed)
