"""Checks before a head gets parameters of other shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._dtensor import is_dtensor


def check_generator(generator: object) -> torch.Generator:
    """Return the generator; the CPU's default generator for None.

    Raises:
        TypeError: the argument is neither.
    """
    if generator is None:
        return torch.default_generator
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    return generator


def check_plain(head: nn.Module, method: str, names: Iterable[str]) -> None:
    """Check that no parametrization computes a parameter that `method` is about to replace.

    Raises:
        RuntimeError: a parameter is parametrized, by `torch.nn.utils.parametrize` or by an older hook.
    """
    for name in names:
        if parametrize.is_parametrized(head, name):
            kinds = ", ".join(type(p).__name__ for p in head.parametrizations[name])  # type: ignore[index]
            raise RuntimeError(
                f"{method}: expected {name} to be a plain parameter, got the parametrization {kinds}; call "
                f"torch.nn.utils.parametrize.remove_parametrizations(head, {name!r}) first and parametrize it again "
                "afterward"
            )
        # weight_norm, spectral_norm and prune of torch.nn.utils keep the parameter under these names.
        hidden = [key for key in (f"{name}_g", f"{name}_v", f"{name}_orig") if key in head._parameters]
        if hidden:
            raise RuntimeError(
                f"{method}: expected {name} to be a plain parameter, got {' and '.join(hidden)}; call "
                f"torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove (head, {name!r}) first"
            )


def check_all_plain(head: nn.Module, method: str) -> None:
    """Check as `check_plain` all parameters of a head."""
    names = {name.removesuffix("_orig").removesuffix("_g").removesuffix("_v") for name in head._parameters}
    check_plain(head, method, sorted(names | set(getattr(head, "parametrizations", ()))))


def check_whole(head: nn.Module, method: str) -> None:
    """Check that the classes of a head are not divided between processes.

    Raises:
        RuntimeError: they are.
    """
    if any(is_dtensor(p) for p in head.parameters()):
        raise RuntimeError(
            f"{method}: expected a head whose parameters are not DTensors; save a sharded head by "
            "gistops.distributed.save_checkpoint and load it into a head that is not sharded"
        )


def distribute_like(head: nn.Module, old: torch.Tensor, names: Iterable[str]) -> None:
    """Make parameters of a head DTensors, with the values of rank 0 in all processes, if `old` is one."""
    if not is_dtensor(old):
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    for name in names:
        parameter = getattr(head, name, None)
        if parameter is not None:
            value = distribute_tensor(parameter.detach(), old.device_mesh, [Replicate()])  # type: ignore[attr-defined]
            setattr(head, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
