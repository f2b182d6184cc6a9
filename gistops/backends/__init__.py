"""The backends, and the choice of the backend that serves a call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .._functorch import unsupported_transform
from . import native, triton
from .plain import PlainOps

NAMES = ("cpu", "cuda", "triton", "reference")

#: Backend -> the device types that it serves, and a function of a device type that returns why it cannot serve, or None.
_AVAILABILITY: dict[str, tuple[tuple[str, ...], Callable[[str], str | None]]] = {
    "cpu": (("cpu", "meta"), native.why_not_cpu),
    "cuda": (("cuda", "meta"), native.why_not_cuda),
    "triton": (("cuda", "cpu", "meta"), triton.why_not),
}

#: Device type -> the backends to choose from by default, in order of preference. AMD GPUs have type "cuda" in torch, too.
_PREFERRED = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("cuda", "triton")}


class BackendUnavailable(RuntimeError):
    """Raised if a backend is requested by name and cannot serve; the message says why and how to get it."""


def why_not(name: str, device_type: str | None = None) -> str | None:
    """Return why a backend cannot serve here and how to get it, or None if it can.

    Args:
        name: one of `NAMES`.
        device_type: device type of the tensors; by default the first type that the backend serves.
    """
    if name == "reference":
        return None
    devices, find_reason = _AVAILABILITY[name]
    return find_reason(device_type or devices[0])


def choose(device_type: str, requested: str | None) -> str:
    """Return the backend for tensors on `device_type`: the requested backend, or the preferred one that is available.

    Inside a transform of `torch.func` other than `vmap`, and inside `torch.autograd.forward_ad`, it is the reference. During
    an ONNX export it is "plain", which has forward ops alone.

    Raises:
        ValueError: `requested` is not the name of a backend, or the backend does not serve the device type.
        BackendUnavailable: the requested backend cannot be used here.
        NotImplementedError: the requested backend does not support an active transform.
    """
    if requested is not None:
        if requested not in NAMES:
            raise ValueError(
                f"backend: expected None or one of {', '.join(map(repr, NAMES))}, got {requested!r}"
            )
        if requested == "reference":
            return requested
        devices, find_reason = _AVAILABILITY[requested]
        if device_type not in devices:
            raise ValueError(
                f"backend: {requested!r} serves tensors on {devices[0]!r}, got tensors on {device_type!r}"
            )
        if reason := find_reason(device_type):
            raise BackendUnavailable(f"backend: {requested!r} is not available: {reason}")
        if transform := unsupported_transform():
            raise NotImplementedError(
                f"backend: expected None or 'reference' inside {transform}, got {requested!r}, "
                "which supports torch.vmap and reverse-mode autograd, once"
            )
        return "plain" if exporting_to_onnx() and requested != "reference" else requested
    if unsupported_transform():
        return "reference"
    if exporting_to_onnx():
        return "plain"
    reasons = []
    for name in _PREFERRED.get(device_type, ()):
        reason = why_not(name, device_type)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or "no backend supports it"
    _warn_once(f"gistops: no fused backend is available for {device_type!r} ({why}); ")
    return "reference"


def exporting_to_onnx() -> bool:
    """Return True during `torch.onnx.export`."""
    onnx = sys.modules.get("torch.onnx")  # torch does not import it
    return onnx is not None and bool(onnx.is_in_onnx_export())


def ops(backend: str) -> Any:
    """Return the namespace that holds the ops of a backend other than the reference."""
    if backend == "plain":
        return PlainOps
    return torch.ops.gistops_triton if backend == "triton" else torch.ops.gistops


def allow_tf32(backend: str) -> bool:
    """Return True if float32 products may be rounded to tf32: torch's setting for matmul on GPUs, False on the CPU."""
    return backend != "cpu" and _cuda_allows_tf32()


def _cuda_allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile takes the results as constants and keeps the access to files and settings out of its graph. This is
# torch.compiler.assume_constant_result without its import of torch._dynamo, which takes over a second at start-up.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]

_warned: set[str] = set()


def _warn_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            why + "the reference backend is used instead: same results, about ten times slower. "
            "`python -m gistops.info` shows details; backend='reference' silences this warning.",
            RuntimeWarning,
            stacklevel=4,
        )
