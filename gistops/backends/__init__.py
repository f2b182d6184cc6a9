"""The backends of the operators, and which of them serves a call."""

from __future__ import annotations

import warnings

from . import native

NAMES = ("cpu", "reference")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says why and how to get it."""


def choose(device_type: str, requested: str | None) -> str:
    """The backend that serves tensors on `device_type`: the one requested, or the best that is there.

    Raises:
        ValueError: `requested` is no backend's name, or serves another device.
        BackendUnavailable: the requested backend is not built here.
    """
    if requested is not None and requested not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, NAMES))}, got {requested!r}")
    if requested == "reference":
        return "reference"
    if requested == "cpu" and device_type not in ("cpu", "meta"):
        raise ValueError(f"backend: 'cpu' serves tensors on the CPU, got tensors on {device_type!r}")
    if device_type in ("cpu", "meta"):
        status = native.load()
        if status.loaded:
            return "cpu"
        if requested == "cpu":
            raise BackendUnavailable(f"backend: 'cpu' is not available: {status.reason}")
        _warn_once(f"gistops: the compiled CPU backend is not available ({status.reason}); ")
        return "reference"
    _warn_once(f"gistops: there is no fused backend for {device_type!r} in this version; ")
    return "reference"


# torch.compile takes the answer as a constant and leaves the look at the file system out of its graph. What
# torch.compiler.assume_constant_result does, without its import of torch._dynamo (over a second at start-up).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

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
