"""The state of optimizers in a checkpoint, by the names of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import IMPLEMENTATION
from .checkpoint_names import OPTIMIZER_OPTIONS, OPTIMIZER_STATE, Saved, memory_for, plain_name, some


class NamedOptimizer(NamedTuple):
    """An optimizer and the names of its parameters."""

    optimizer: Optimizer
    names: list[list[str]]  # by parameter group

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and parameters."""
        for names, group in zip(self.names, self.optimizer.param_groups, strict=True):
            yield from zip(names, group["params"], strict=True)


def named_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[NamedOptimizer]:
    """Name the parameters of optimizers.

    Raises:
        ValueError: a parameter is not in the model, or in two optimizers.
    """
    known = {parameter: plain_name(model, name) for name, parameter in model.named_parameters()}
    named, seen = [], set[str]()
    for optimizer in optimizers:
        names: list[list[str]] = []
        for i, group in enumerate(optimizer.param_groups):
            names.append([])
            for j, parameter in enumerate(group["params"]):
                if parameter not in known:
                    raise ValueError(
                        f"optimizer: expected parameters of the model, got another one, of shape {list(parameter.shape)}, "
                        f"at position {j} of parameter group {i}; create the optimizer after the last change of the model"
                    )
                names[-1].append(known[parameter])
        named.append(NamedOptimizer(optimizer, names))
        twice = seen.intersection(name for name, _ in named[-1].parameters())
        if twice:
            raise ValueError(
                f"optimizer: expected each parameter in one optimizer, got {some(sorted(twice))} in two"
            )
        seen.update(name for name, _ in named[-1].parameters())
    return named


def optimizer_values(named: Sequence[NamedOptimizer]) -> dict[str, Any]:
    """Return the state and the options of each parameter. Tensors are the optimizers' own memory.

    Raises:
        TypeError: a state is a container, which torch.distributed.checkpoint could not reshard.
    """
    values: dict[str, Any] = {}
    for optimizer, names_by_group in named:
        saved = optimizer.state_dict()
        for names, group in zip(names_by_group, saved["param_groups"], strict=True):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for name, number in zip(names, group["params"], strict=True):
                values |= {f"{OPTIMIZER_OPTIONS}{name}.{key}": value for key, value in options.items()}
                for key, value in saved["state"].get(number, {}).items():
                    if isinstance(value, dict | list | tuple):
                        raise TypeError(
                            f"optimizer: expected tensors and numbers in the state of {name}, got a "
                            f"{type(value).__name__} for {key!r}"
                        )
                    values[f"{OPTIMIZER_STATE}{name}.{key}"] = value
    return values


def state_to_load(named: Sequence[NamedOptimizer], saved: Saved, strict: bool) -> dict[str, Any]:
    """Return memory for the state and the options that a checkpoint has for the parameters of optimizers.

    Raises:
        ValueError: the checkpoint has no optimizer, one of another class, or one for other parameters.
    """
    entries = [name for name in saved if name.startswith((OPTIMIZER_STATE, OPTIMIZER_OPTIONS))]
    if not entries:
        raise ValueError("expected None, because the checkpoint has no state of an optimizer")
    parameters = {name: parameter for one in named for name, parameter in one.parameters()}
    memory, found, unknown = {}, set[str](), set[str]()
    for entry in entries:
        prefix = OPTIMIZER_STATE if entry.startswith(OPTIMIZER_STATE) else OPTIMIZER_OPTIONS
        name = entry.removeprefix(prefix).rpartition(".")[0]
        if name in parameters:
            found.add(name)
            memory[entry] = memory_for(saved[entry], parameters[name])
        else:
            unknown.add(name)
    for one in named:
        _check_class(one, entries)
    if strict:
        problems = [f"{name} is not in the checkpoint's" for name in parameters if name not in found]
        problems += [f"{name} is in the checkpoint's alone" for name in sorted(unknown)]
        if problems:
            raise ValueError(some(problems))
    return memory


def _check_class(named: NamedOptimizer, entries: Sequence[str]) -> None:
    """Check that the saved options of a parameter are not those of another class of optimizers.

    Versions of PyTorch add options, so that one side may have more, but not each side.

    Raises:
        ValueError: both sides have options that the other lacks.
    """
    own = set(named.optimizer.defaults) - set(IMPLEMENTATION)
    for name, _ in named.parameters():
        prefix = f"{OPTIMIZER_OPTIONS}{name}."
        saved = {entry.removeprefix(prefix) for entry in entries if entry.startswith(prefix)}
        saved -= {"initial_lr", *IMPLEMENTATION}  # a learning rate schedule adds the first
        if saved - own and own - saved:
            raise ValueError(
                f"expected options of {type(named.optimizer).__name__} for {name}, the checkpoint has {some(sorted(saved - own))} "
                f"and lacks {some(sorted(own - saved))}: it is of another class of optimizers"
            )
        return  # all parameters of an optimizer have the same options


def load_optimizers(named: Sequence[NamedOptimizer], values: Mapping[str, Any]) -> None:
    """Load the state and the options of each parameter.

    Raises:
        ValueError: the parameters of a group have different options in the checkpoint.
    """
    state_of, options_of = _by_parameter(values, OPTIMIZER_STATE), _by_parameter(values, OPTIMIZER_OPTIONS)
    for optimizer, names_by_group in named:
        state: dict[int, dict[str, Any]] = {}
        groups, number = [], 0
        for i, (names, group) in enumerate(zip(names_by_group, optimizer.param_groups, strict=True)):
            options = _common_options(i, [(name, options_of.get(name, {})) for name in names])
            kept = {key: value for key, value in group.items() if key != "params" and key not in options}
            numbers = list(range(number, number + len(names)))
            groups.append({**options, **kept, "params": numbers})
            state |= {n: state_of[name] for n, name in zip(numbers, names, strict=True) if name in state_of}
            number += len(names)
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _by_parameter(values: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry, value in values.items():
        if entry.startswith(prefix):
            name, _, key = entry.removeprefix(prefix).rpartition(".")
            found.setdefault(name, {})[key] = value
    return found


def _common_options(group: int, options: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the options of a group of parameters.

    Raises:
        ValueError: they differ within the group.
    """
    common: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name, own in options:
        for key, value in own.items():
            if key in IMPLEMENTATION:  # not loaded
                continue
            if key in common and common[key] != value:
                raise ValueError(
                    f"optimizer: expected one {key} for parameter group {group}, the checkpoint has {common[key]} for "
                    f"{owner[key]} and {value} for {name}"
                )
            common.setdefault(key, value)
            owner.setdefault(key, name)
    return common
