"""The values of a model in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn import ConstellationClassifier
from ..nn.state import TRANSFORM_WEIGHTS
from .checkpoint_names import MODEL, Saved, memory_for, plain_name, saved_size, some

ADAPTED = ("displacements", *(name for names in TRANSFORM_WEIGHTS.values() for name in names))


class Value(NamedTuple):
    """A value of a model."""

    key: str  # in the model's state dict
    value: Any


def model_values(model: nn.Module) -> dict[str, Value]:
    """Return the values of a model by their names in a checkpoint. The tensors are the model's own memory.

    Raises:
        ValueError: a tensor is on the meta device, where it has no values.
    """
    values = {MODEL + plain_name(model, key): Value(key, value) for key, value in model.state_dict().items()}
    meta = [
        name.removeprefix(MODEL) for name, (_, value) in values.items() if getattr(value, "is_meta", False)
    ]
    if meta:
        raise ValueError(f"model: expected tensors with values, got the meta device for {some(meta)}")
    return values


def values_to_load(model: nn.Module, saved: Saved, strict: bool) -> tuple[dict[str, Value], list[str]]:
    """Return the values of a model that a checkpoint has, and the heads whose number of displacements it changes.

    Such a head has other parameters after `load_state_dict`: its values here are new memory for them.

    Raises:
        ValueError: a name or a shape does not match.
    """
    values = model_values(model)
    changed = []
    for key, head in model.named_modules():
        if isinstance(head, ConstellationClassifier) and _adapt(model, key, head, values, saved):
            changed.append(plain_name(model, key) or type(head).__name__)
    problems = []
    for name, (_, value) in values.items():
        if name not in saved and strict:
            problems.append(f"{name.removeprefix(MODEL)} is not in the checkpoint")
        elif name in saved and isinstance(value, Tensor) and value.shape != (size := saved_size(saved, name)):
            got = "no tensor" if size is None else list(size)
            problems.append(
                f"{name.removeprefix(MODEL)}: expected {list(value.shape)}, the checkpoint has {got}"
            )
    if strict:
        unknown = [name for name in saved if name.startswith(MODEL) and name not in values]
        problems += [f"{name.removeprefix(MODEL)} is in the checkpoint alone" for name in unknown]
    if problems:
        raise ValueError(some(problems))
    return {name: value for name, value in values.items() if name in saved}, changed


def _adapt(
    model: nn.Module, key: str, head: ConstellationClassifier, values: dict[str, Value], saved: Saved
) -> bool:
    """Replace the values of a head whose number of displacements changes; return whether it does."""
    prefix = f"{key}." if key else ""
    name = MODEL + plain_name(model, f"{prefix}displacements").removesuffix("displacements")
    size = saved_size(saved, f"{name}displacements")
    if f"{name}displacements" not in values or size is None or len(size) != 2:
        return False
    if size[1] != head.in_features or size[0] == head.num_displacements:
        return False
    for weight in ADAPTED:
        values.pop(name + weight, None)
        if name + weight in saved:
            memory = memory_for(saved[name + weight], head.displacements)
            values[name + weight] = Value(prefix + weight, memory)
    return True


def load_model(model: nn.Module, values: Mapping[str, Value], strict: bool) -> None:
    """Load values of a model, which `load_state_dict` may adapt or check once more."""
    model.load_state_dict({key: value for key, value in values.values()}, strict=strict)
