"""Export to formats that do not have the ops of gistops.

`torch.onnx.export(head.eval(), (features,), dynamic_shapes=({0: "batch"},))` works as for any module: during an ONNX export
the functions use plain PyTorch. For other formats, a program of `torch.export` is decomposed:

    program = torch.export.export(head.eval(), (features,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    program = program.run_decompositions(gistops.export.decompositions())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backends import native
from .backends.plain import PlainOps


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a table for `ExportedProgram.run_decompositions` that replaces the forward ops by ops of PyTorch.

    The table includes `torch.export.default_decompositions()`.

    Raises:
        RuntimeError: the compiled ops are not available.
    """
    status = native.load()
    if not status.loaded:
        raise RuntimeError(f"gistops.export needs the compiled ops: {status.reason}")
    table = dict(torch.export.default_decompositions().items())
    for name in ("logits_forward", "subcenter_forward", "rotation_forward", "frozen_logits", "topk"):
        table[getattr(torch.ops.gistops, name).default] = getattr(PlainOps, name).default
    return table
