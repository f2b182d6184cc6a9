"""What the dispatcher knows of the operators beyond their kernels: schemas, fake kernels, autograd, autocast.

Each family of kernels has the same operators. The compiled family, `constellation`, is defined in `csrc/schema.cpp`
with kernels in C++; others are defined here from Python. A family of kernels that make and take logits gets its loss and
its best k by streaming over chunks of classes (`streaming.py`), unless it has kernels of its own for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from . import cross_entropy, frozen, logits, loss, registry, streaming, tabled, topk

__all__ = [
    "complete_compiled",
    "cross_entropy",
    "define",
    "logits",
    "loss",
    "registry",
    "streaming",
    "tabled",
    "topk",
]


def complete_compiled(cuda: bool) -> None:
    """Complete the compiled family, once it is loaded; `cuda`: it has kernels for CUDA."""
    logits.complete("constellation")
    loss.complete("constellation")
    cross_entropy.complete("constellation")
    topk.complete("constellation")
    tabled.complete("")
    frozen.complete()
    if cuda:
        over = streaming.Streaming("constellation")
        registry.implement("constellation_lse_forward", over.lse_forward, "CUDA")
        registry.implement("constellation_lse_backward", over.lse_backward, "CUDA")
        registry.implement("constellation_topk", over.topk, "CUDA")
        registry.implement("tabled_forward", over.tabled_forward, "CUDA")
        registry.implement("tabled_backward", over.tabled_backward, "CUDA")
        logits.define("cuda_free", over.free_forward, over.free_backward, ("CUDA",))


def define(family: str, forward: logits.Kernel, backward: logits.Kernel, devices: Sequence[str]) -> None:
    """Make all operators of a family from Python kernels for logits; arguments as `logits.define`."""
    logits.define(family, forward, backward, devices)
    over = streaming.Streaming(family)
    logits.define(f"{family}_free", over.free_forward, over.free_backward, devices)
    make = functools.partial(registry.define, devices=devices)
    make(f"{family}_lse_forward", loss.FORWARD_SCHEMA, over.lse_forward)
    make(f"{family}_lse_backward", loss.BACKWARD_SCHEMA, over.lse_backward)
    make(f"{family}_topk", topk.SCHEMA, over.topk)
    make(f"{family}_tabled_forward", tabled.FORWARD_SCHEMA, over.tabled_forward)
    make(f"{family}_tabled_backward", tabled.BACKWARD_SCHEMA, over.tabled_backward)
    tabled.complete(f"{family}_")
    loss.complete(family)
    topk.complete(family)
