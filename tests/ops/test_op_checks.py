"""Compiled ops, called directly: whatever argument is wrong, an op raises an error that names it, and never crashes.

A table gives the shape of every argument. Each argument is changed in turn: its sizes, dtype and device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gistops import backends

SIZES = {"B": 3, "K": 5, "M": 3, "d": 8, "m": 2, "3": 3, "1": 1}
VECTORS = {"input": "B d", "centers": "K d", "displacements": "m d", "tau": "1"}
SUBCENTERS = {"input": "B d", "centers": "K M d", "tau": "1"}
ROTATED = {"input": "B d", "centers": "K d", "tau": "1", "directions": "M d", "turns": "3 m"}
SAVED = {"logits": "B K", "slots": "B K", "center_rnorms": "M K", "input_rnorms": "B"}
PARTS = VECTORS | {"class_bias": "K", "target": "B", "weight": "K"}
PART_GRADS = {name: "B" for name in ("grad_lse_others", "grad_target_logits", "grad_weighted_sums")}
#: Op -> the shapes of its tensors, and its other arguments.
OPS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "logits_forward": (VECTORS, {}),
    "logits_backward": ({"grad": "B K"} | VECTORS | SAVED, {}),
    "subcenter_forward": (SUBCENTERS, {}),
    "subcenter_backward": ({"grad": "B K"} | SUBCENTERS | SAVED, {}),
    "rotation_forward": (ROTATED, {}),
    "rotation_backward": ({"grad": "B K"} | ROTATED | SAVED, {}),
    "center_norms": ({"centers": "K d", "displacements": "m d"}, {}),
    "frozen_logits": (VECTORS | {"norms": "M K"}, {}),
    "topk": (VECTORS | {"class_bias": "K", "norms": "M K"}, {"k": 4, "need_lse": True}),
    "cross_entropy_parts_forward": (PARTS, {"ignore_index": -100}),
    "cross_entropy_parts_backward": (PART_GRADS | PARTS | {"lse_others": "B"}, {"ignore_index": -100}),
    "stashed_cross_entropy_parts_forward": (PARTS | {"stash": "K d"}, {"ignore_index": -100}),
    "stashed_cross_entropy_forward": (
        VECTORS | {"target": "B", "weight": "K", "stash": "K d"},
        {"ignore_index": -100},
    ),
    "rotation_planes": ({"displacements": "m d", "axis": "d"}, {"dtype": torch.float32}),
    "rotation_planes_backward": (
        {"grad_directions": "M d", "grad_turns": "3 m", "displacements": "m d", "axis": "d"},
        {},
    ),
    "stashed_cross_entropy_parts_backward": (
        PART_GRADS | PARTS | {"lse_others": "B", "stash": "K d"},
        {"ignore_index": -100},
    ),
}
pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Load the compiled ops."""
    assert backends.why_not("cpu") is None


def call(op: str, arguments: dict[str, Any]) -> Any:
    operator = getattr(backends.ops("cpu"), op).default
    others = {a.name: None if "Optional" in str(a.type) else True for a in operator._schema.arguments}
    return operator(**others | OPS[op][1] | arguments)


def arguments_of(op: str, **sizes: int) -> dict[str, Tensor]:
    """Return valid tensors; `sizes` replaces some of SIZES."""
    shapes, _ = OPS[op]
    tensors = {
        name: torch.rand([(SIZES | sizes)[size] for size in shape.split()]) for name, shape in shapes.items()
    }
    for name, dtype in (("target", torch.int64), ("slots", torch.uint8)):
        if name in tensors:
            tensors[name] = torch.zeros_like(tensors[name], dtype=dtype)
    return tensors


def resized(shapes: dict[str, str], name: str, x: Tensor) -> Iterator[Tensor]:
    """Yield the tensor with each of its sizes changed that another argument has too, and with other dimensions."""
    symbols = shapes[name].replace("m", "M").split()
    every = [size for shape in shapes.values() for size in shape.replace("m", "M").split()]
    for dim, symbol in enumerate(symbols):
        if symbol in "13" or every.count(symbol) > 1:
            yield x.narrow(dim, 0, 0)
            yield torch.cat([x, x], dim)
            if symbol != "1":
                yield x.narrow(dim, 0, x.shape[dim] - 1)
    if symbols != ["1"]:  # any tensor of one element is a tau
        yield x[None]
        yield x[0]


@pytest.mark.parametrize("op", OPS)
def test_valid_arguments(op: str) -> None:
    call(op, arguments_of(op))
    strided = {
        name: torch.stack([x, x], -1)[..., 0] for name, x in arguments_of(op).items() if name != "stash"
    }
    call(op, arguments_of(op) | strided)


@pytest.mark.parametrize("op", OPS)
def test_sizes(op: str) -> None:
    arguments = arguments_of(op)
    for name, x in arguments.items():
        for wrong in resized(OPS[op][0], name, x):
            with pytest.raises(RuntimeError, match=r"gistops: .*expected .* got"):
                call(op, arguments | {name: wrong})
    with pytest.raises(RuntimeError, match=r"d >= 1, got"):
        call(op, arguments_of(op, d=0))
    if "displacements" in arguments:
        with pytest.raises(RuntimeError, match="displacements: expected at most 255 rows, got 256"):
            call(op, arguments_of(op, m=256, M=257))
    elif "forward" in op:
        with pytest.raises(RuntimeError, match="1 <= M <= 256"):
            call(op, arguments_of(op, M=257))


@pytest.mark.parametrize("op", OPS)
def test_dtypes(op: str) -> None:
    arguments = arguments_of(op)
    for name, x in arguments.items():
        for dtype in (torch.int16, torch.bool, torch.complex64):
            with pytest.raises(RuntimeError, match=f"gistops: {name}: expected .*, got"):
                call(op, arguments | {name: x.to(dtype)})


@pytest.mark.parametrize("op", OPS)
def test_devices(op: str) -> None:
    arguments = arguments_of(op)
    for name, x in arguments.items():
        with pytest.raises(RuntimeError, match=r"expected device|Meta"):
            call(op, arguments | {name: x.to("meta")})


@pytest.mark.parametrize("op", [op for op in OPS if "slots" in OPS[op][0] or "target" in OPS[op][0]])
def test_values_out_of_range(op: str) -> None:
    arguments = arguments_of(op)
    if "slots" in arguments:  # a slot that does not exist wins nothing
        call(op, arguments | {"slots": torch.full_like(arguments["slots"], 255)})
    if "target" in arguments:
        for value in (-1, 5, 1 << 40):
            with pytest.raises(RuntimeError, match="target: expected 0 to 4 or ignore_index -100, got"):
                call(op, arguments | {"target": torch.full_like(arguments["target"], value)})


def test_directions_of_a_rotation_without_turns() -> None:
    arguments = arguments_of("cross_entropy_parts_forward")
    with pytest.raises(RuntimeError, match="directions, turns: expected both or neither"):
        call("cross_entropy_parts_forward", arguments | {"directions": torch.ones(3, 8)})


def test_number_of_classes_of_topk() -> None:
    for k in (0, -1, 6):
        with pytest.raises(RuntimeError, match=f"k: expected 1 to 5, got {k}"):
            call("topk", arguments_of("topk") | {"k": k})


def test_stash_that_is_not_memory_for_scores() -> None:
    arguments = arguments_of("stashed_cross_entropy_parts_forward")
    for stash in (torch.ones(8, 5).T, torch.ones(41)[1:].view(5, 8)):
        with pytest.raises(RuntimeError, match="stash: expected contiguous memory at a multiple of 8 bytes"):
            call("stashed_cross_entropy_parts_forward", arguments | {"stash": stash})


def test_memory_that_cannot_be_allocated() -> None:
    """The error says what was asked for."""
    x, tau = torch.zeros(1 << 22, 1), torch.ones(())
    with pytest.raises(
        RuntimeError, match=r"gistops: allocating \[4194304, 4194304\] Float failed, .*memory"
    ):
        call("logits_forward", {"input": x, "centers": x, "displacements": x[:0], "tau": tau})
