"""Centres moved by a small network (GistNet's MLP g): vectors written out, a chunk of classes at a time.

    v_k0 = w_k,    v_kj = w_k + B relu(A [ŵ_k; δ_j])

with ŵ_k the unit vector of w_k, A [h, 2d] and B [d, h]. A chunk's vectors are free centres to the operators, and the backward
makes them again. So M products, not one: what a g that is no translation or rotation costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..operators.registry import compute_dtype, knows_autocast
from ..operators.streaming import join_best
from .fused import allow_tf32, family, fused, no_displacements

#: Elements of a chunk's vectors, at most: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24
Mlp = tuple[Tensor, Tensor]


def vectors(centers: Tensor, displacements: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """v [k, m + 1, d] of centers [k, d]; the hidden layer's part of ŵ is made once for all slots."""
    dtype = compute_dtype(centers, displacements, first, second)
    device = centers.device.type
    with torch.autocast(device, enabled=False) if knows_autocast(device) else nullcontext():
        w, a = centers.to(dtype), first.to(dtype)
        of_center, of_displacement = a.split(centers.shape[1], dim=1)
        own = F.linear(F.normalize(w, dim=1, eps=1e-12), of_center)
        hidden = (own[:, None] + F.linear(displacements.to(dtype), of_displacement)).relu()
        return torch.cat([w[:, None], w[:, None] + F.linear(hidden, second.to(dtype))], dim=1)


def logits(
    backend: str, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, mlp: Mlp
) -> tuple[Tensor, Tensor]:
    """logits and slots [B, K] by a fused backend."""

    def some(input: Tensor, tau: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fused(backend, input, v, no_displacements(input), tau)

    made = [
        _again(some, input, tau, centers[part], displacements, mlp) for part in _parts(centers, displacements)
    ]
    return torch.cat([best for best, _ in made], 1), torch.cat([slots for _, slots in made], 1)


def lse(
    backend: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    mlp: Mlp,
    class_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `loss.FORWARD_SCHEMA` gives, by a fused backend."""
    operator = getattr(torch.ops.gistops, f"{family(backend)}_lse_forward").default
    tf32 = allow_tf32(backend)
    made = []
    for part in _parts(centers, displacements):
        here = (target >= part.start) & (target < part.stop) & (target != ignore_index)
        place = torch.where(here, target - part.start, -100)
        of_part = [None if x is None else x[part] for x in (class_bias, weight)]

        def some(
            input: Tensor, tau: Tensor, v: Tensor, place: Tensor, bias: Tensor | None, weight: Tensor | None
        ) -> tuple[Tensor, ...]:
            arguments = (input, v, no_displacements(input), tau, bias, None, None, place, weight, -100, tf32)
            return tuple(operator(*arguments))

        made.append(_again(some, input, tau, centers[part], displacements, mlp, place, *of_part))
    others, own, sums = zip(*made, strict=True)
    if len(made) == 1:
        return others[0], own[0], sums[0]
    return torch.stack(others).logsumexp(0), torch.stack(own).sum(0), torch.stack(sums).sum(0)


def topk(
    backend: str,
    input: Tensor,
    centers: Tensor,
    displacements: Tensor,
    tau: Tensor,
    mlp: Mlp,
    class_bias: Tensor | None,
    k: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `topk.SCHEMA` gives, by a fused backend."""
    operator = getattr(torch.ops.gistops, f"{family(backend)}_topk").default
    best: tuple[Tensor, ...] = ()
    sums = []
    for part in _parts(centers, displacements):
        bias = None if class_bias is None else class_bias[part]
        v = vectors(centers[part], displacements, *mlp)
        count = min(k, part.stop - part.start)
        values, classes, slots, some = operator(
            input,
            v,
            no_displacements(input),
            tau,
            bias,
            None,
            None,
            count,
            return_lse,
            allow_tf32(backend),
            None,
        )
        best = join_best(best, (values, classes + part.start, slots), k)
        sums.append(some)
    values, classes, slots = best
    return values, classes, slots, torch.stack(sums).logsumexp(0) if return_lse else sums[0]


def _parts(centers: Tensor, displacements: Tensor) -> Iterator[slice]:
    """Chunks of classes; one that is empty where there is no class."""
    classes, d = centers.shape
    size = max(1, CHUNK_ELEMENTS // ((displacements.shape[0] + 1) * d))
    return (slice(start, min(start + size, classes)) for start in range(0, max(classes, 1), size))


def _again(
    function: Callable[..., Any],
    input: Tensor,
    tau: Tensor,
    centers: Tensor,
    displacements: Tensor,
    mlp: Mlp,
    *rest: Tensor | None,
) -> Any:
    """function(input, tau, vectors, *rest) with vectors that are not kept, but made again in the backward."""

    def made(input: Tensor, tau: Tensor, w: Tensor, delta: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
        return function(input, tau, vectors(w, delta, a, b), *rest)

    arguments: tuple[Any, ...] = (input, tau, centers, displacements, *mlp, *rest)
    if not torch.is_grad_enabled():
        return made(*arguments)
    return checkpoint(made, *arguments, use_reentrant=False, preserve_rng_state=False)
