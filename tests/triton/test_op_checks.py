"""Triton's ops, called directly: a wrong argument raises an error that names it. Run by test_interpreter.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gistops

from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs this file", allow_module_level=True)

B, K, M, d = 3, 5, 3, 8
VECTORS: dict[str, tuple[int, ...]] = {
    "input": (B, d),
    "centers": (K, d),
    "displacements": (M - 1, d),
    "tau": (1,),
}
NORMS: dict[str, tuple[int, ...]] = {"center_rnorms": (M, K), "input_rnorms": (B,)}
LOSS = VECTORS | {"target": (B,), "class_bias": (K,), "weight": (K,), "margin": (K,)}
#: Op -> the shapes of its tensors. Changing the size of one of them alone is an error.
OPS: dict[str, dict[str, tuple[int, ...]]] = {
    "logits_forward": VECTORS,
    "logits_backward": {"grad": (B, K)} | VECTORS | {"logits": (B, K), "slots": (B, K)} | NORMS,
    "cross_entropy_forward": LOSS,
    "cross_entropy_backward": {"grad_loss": (), "grad_lse": (B,)}
    | LOSS
    | {"lse": (B,), "scores": (K, 16), "slots": (K, 16)}
    | NORMS
    | {"rows": (5, B), "scalars": (2,)},
}
OPTIONS = {
    "margin_kind": 0,
    "reduction": 1,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "allow_tf32": False,
    "input_coeffs": None,
    "class_coeffs": None,
}


def call(op: str, arguments: dict[str, Any]) -> None:
    operator = getattr(torch.ops.gistops_triton, op).default
    others = {a.name: OPTIONS.get(a.name, True) for a in operator._schema.arguments}
    operator(**others | arguments)


def tensors(op: str) -> dict[str, Tensor]:
    made = {name: torch.rand(shape) for name, shape in OPS[op].items()}
    for name, dtype in (("target", torch.int64), ("slots", torch.uint8)):
        if name in made:
            made[name] = torch.zeros_like(made[name], dtype=dtype)
    return made


@pytest.mark.parametrize("op", OPS)
def test_arguments_of_ops(op: str) -> None:
    assert gistops.backends.choose("cpu", "triton") == "triton"  # which defines the ops
    valid = tensors(op)
    free = {
        "logits_forward": ("input", "centers", "displacements"),
        "cross_entropy_forward": ("displacements",),
    }
    for name, x in valid.items():
        for dim in range(1 if name in free.get(op, ()) else 0, x.dim()):  # the number of rows is free
            with pytest.raises(RuntimeError, match=r": expected .*, got"):
                call(op, valid | {name: torch.cat([x, x], dim)})
        if name != "tau":
            with pytest.raises(RuntimeError, match=rf"{name}: expected .*, got"):
                call(op, valid | {name: x[None]})
        with pytest.raises(RuntimeError, match="expected device"):
            call(op, valid | {name: x.to("meta")})
    for name in ("input", "centers", "displacements", "tau"):
        with pytest.raises(RuntimeError, match=f"{name}: expected float32, .* got torch.int32"):
            call(op, valid | {name: valid[name].int()})
    empty = {name: torch.rand(shape[0], 0) for name, shape in VECTORS.items() if name != "tau"}
    with pytest.raises(RuntimeError, match="d >= 1, got"):
        call(op, valid | empty)
