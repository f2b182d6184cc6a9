"""Checks of a state dict before any value of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, MAX_SLOTS

#: The weights of a transform besides centers and displacements.
TRANSFORM_WEIGHTS: dict[str, tuple[str, ...]] = {"rotation": ("axis",), "mlp": ("mlp_in", "mlp_out")}


def entries(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries of a module by their names in the module."""
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def is_matrix(value: Any, columns: int) -> TypeGuard[Tensor]:
    """Return True for a tensor [any, columns]."""
    return torch.overrides.is_tensor_like(value) and value.dim() == 2 and value.shape[1] == columns  # type: ignore[no-any-return]


def errors(
    given: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    prefix: str,
    transform: str,
    assign: bool,
) -> list[str]:
    """Return a sentence for each entry that a head of these shapes and this transform cannot take."""
    found = []
    for name in shapes.keys() & given.keys():
        key, value, shape = prefix + name, given[name], list(shapes[name])
        if not torch.overrides.is_tensor_like(value):
            found.append(f"{key}: expected a torch.Tensor, got {type(value).__name__}.")
        elif assign and value.dtype not in FLOAT_DTYPES:
            found.append(f"{key}: expected float32, float16, bfloat16 or float64, got {value.dtype}.")
        elif name == "displacements" and value.dim() == 2 and len(value) >= MAX_SLOTS:
            found.append(
                f"{key}: expected at most {MAX_SLOTS - 1} rows (slots are uint8), got {list(value.shape)}."
            )
        elif list(value.shape) != shape:
            found.append(f"size mismatch for {key}: expected {shape}, got {list(value.shape)}.")
    if "displacements" in shapes.keys() & given.keys():
        found += [
            f"{prefix}displacements: expected those of a {transform}, got those of a {other}: the state dict has "
            f"{prefix}{name}."
            for other, names in TRANSFORM_WEIGHTS.items()
            for name in names
            if other != transform and name in given and name not in shapes
        ]
    return sorted(found)


def missing(given: Mapping[str, Any], new: Iterable[str], prefix: str) -> list[str]:
    """Return a sentence for each new weight of a transform that the state dict lacks: no other value makes sense."""
    return [
        f"{prefix}{name}: expected a torch.Tensor besides the displacements, got no entry."
        for name in new
        if name not in given
    ]
