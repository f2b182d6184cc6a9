"""The backends of the operators, and which of them serves a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import native, triton

NAMES = ("cpu", "cuda", "triton", "reference")

#: Backend -> the device types that it serves, and a function of one of them that says why it cannot here, or None.
_JUDGES: dict[str, tuple[tuple[str, ...], Callable[[str], str | None]]] = {
    "cpu": (("cpu", "meta"), native.why_not_cpu),
    "cuda": (("cuda", "meta"), native.why_not_cuda),
    "triton": (("cuda", "cpu", "meta"), triton.why_not),
}

#: Device type -> the backends that serve it unasked, the first that can. "cuda" is also what torch calls AMD's GPUs.
_PREFERRED = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("cuda", "triton")}


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says why and how to get it."""


def why_not(name: str, device_type: str | None = None) -> str | None:
    """Why the backend cannot serve here, and how to get it; None if it can.

    Args:
        name: one of `NAMES`.
        device_type: the tensors' device type; None for the backend's own.
    """
    if name == "reference":
        return None
    devices, judge = _JUDGES[name]
    return judge(device_type or devices[0])


def choose(device_type: str, requested: str | None) -> str:
    """The backend that serves tensors on `device_type`: the one requested, or the best that is there.

    Raises:
        ValueError: `requested` is no backend's name, or serves another device.
        BackendUnavailable: the requested backend cannot serve here.
    """
    if requested is not None:
        if requested not in NAMES:
            raise ValueError(
                f"backend: expected None or one of {', '.join(map(repr, NAMES))}, got {requested!r}"
            )
        if requested == "reference":
            return requested
        devices, judge = _JUDGES[requested]
        if device_type not in devices:
            raise ValueError(
                f"backend: {requested!r} serves tensors on {devices[0]!r}, got tensors on {device_type!r}"
            )
        if reason := judge(device_type):
            raise BackendUnavailable(f"backend: {requested!r} is not available: {reason}")
        return requested
    reasons = []
    for name in _PREFERRED.get(device_type, ()):
        reason = why_not(name, device_type)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or "none is written for it"
    _warn_once(f"gistops: no fused backend is available for {device_type!r} ({why}); ")
    return "reference"


def ops(backend: str) -> Any:
    """Return the namespace that holds the ops of a fused backend."""
    return torch.ops.gistops_triton if backend == "triton" else torch.ops.gistops


def allow_tf32(backend: str) -> bool:
    """Return True if float32 products may be rounded to tf32: torch's setting for matmul on GPUs, False on the CPU."""
    return backend != "cpu" and _cuda_allows_tf32()


def _cuda_allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile takes the answers as constants and leaves the looks at files and settings out of its graph. What
# torch.compiler.assume_constant_result does, without its import of torch._dynamo (over a second at start-up).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]

_warned: set[str] = set()


def _warn_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            why + "the reference backend serves instead: same results, about ten times slower. "
            "`python -m gistops.info` says more; backend='reference' silences this.",
            RuntimeWarning,
            stacklevel=4,
        )
