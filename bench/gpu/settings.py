"""The settings that a variant forces: how each is applied in a `with`, and why it may not be available.

If a setting does not exist in gistops, its variants are absent with the reason, and no error is raised. A setting
applies to the whole process, because the backward runs in autograd's thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A value that can be forced."""

    place: str  # the name in the table of tile_tables.py, a module's attribute, or an environment variable
    why_not: Callable[[Any], str | None]
    apply: Callable[[Any, str], contextlib.AbstractContextManager[Any]]  # value, precision


def _module(name: str) -> Any:
    return importlib.import_module(f"gistops.{name}")


def _attribute(module: str, name: str) -> Setting:
    """Return the setting of a module's attribute."""

    def why_not(value: Any) -> str | None:
        try:
            there = hasattr(_module(module), name)
        except ImportError as error:
            return str(error)
        return None if there else f"gistops.{module} has no {name}"

    @contextlib.contextmanager
    def apply(value: Any, precision: str) -> Iterator[None]:
        holder = _module(module)
        before = getattr(holder, name)
        setattr(holder, name, value)
        try:
            yield
        finally:
            setattr(holder, name, before)

    return Setting(f"{module}.{name}", why_not, apply)


def _environment(name: str) -> Setting:
    """Return the setting of an environment variable that the kernels read at each call."""

    @contextlib.contextmanager
    def apply(value: Any, precision: str) -> Iterator[None]:
        before = os.environ.get(name)
        os.environ[name] = str(value)
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    return Setting(name, lambda value: None, apply)


def _forced(
    name: str, make: Callable[[Any, Any, str], Any] = lambda configs, value, precision: value
) -> Setting:
    """Return the setting of an argument of `gistops.backends.triton.configs.forced`."""

    def why_not(value: Any) -> str | None:
        try:
            configs = _module("backends.triton.configs")
        except ImportError as error:
            return f"Triton does not load: {error}"
        if not hasattr(configs, "forced"):
            return "gistops.backends.triton.configs has no forced()"
        try:
            with configs.forced(**{name: make(configs, value, "bf16")}):
                return None
        except Exception as error:
            return f"configs.forced({name}=…): {error}"

    def apply(value: Any, precision: str) -> contextlib.AbstractContextManager[Any]:
        configs = _module("backends.triton.configs")
        manager: contextlib.AbstractContextManager[Any] = configs.forced(
            **{name: make(configs, value, precision)}
        )
        return manager

    return Setting(name, why_not, apply)


def _tile(loop: str) -> Callable[[Any, Any, str], Any]:
    """Return a function that converts a bf16 tile: in float32 its `loop` dimension is halved, for the same bytes."""

    def make(configs: Any, value: tuple[int, ...], precision: str) -> Any:
        names = ("classes", "rows", "dims", "warps", "stages")
        tile = dict(zip(names, value, strict=True))
        if precision != "bf16":
            tile[loop] //= 2
        return configs.Config(**tile)

    return make


SETTINGS: dict[str, Setting] = {
    "chunk": _attribute("backends.chunked.scorers", "CHUNK_ELEMENTS"),
    "triton chunk": _attribute("backends.triton.loss_scores", "CHUNK_ELEMENTS"),
    "held bytes": _attribute("backends.eager_loss", "MAX_KEPT_BYTES"),
    "parked": _attribute("backends.eager_loss", "PARK_SCORES"),
    "forward tile": _forced("forward", _tile("dims")),
    "centers tile": _forced("centers", _tile("rows")),
    "cuda centers tile": _environment("GISTOPS_CUDA_CENTERS_TILE"),
    "cuda fused logits": _environment("GISTOPS_CUDA_FUSED_LOGITS"),
    "product": _forced("product"),
    "centers product": _forced("centers_product"),
    "norms": _forced("norms_in_registers"),
    "pool logits": _forced("max_over_slots"),
    "pool": _forced("lse"),
    "softmax": _forced("route_loss_grad"),
    "softmax few": _forced("route_loss_grad_unrolled"),
    "route": _forced("route_logits_grad"),
    "triton few": _attribute("backends.triton.configs", "MAX_UNROLLED_SLOTS"),
    "dW step": _attribute("backends.triton.configs", "STEP_ELEMENTS"),
    "loss programs": _attribute("backends.triton.configs", "LOSS_PROGRAMS"),
}


def why_not(settings: Mapping[str, Any]) -> str | None:
    """Return the reason why the settings cannot be forced here, or None."""
    for name, value in settings.items():
        if name not in SETTINGS:
            return f"no setting is named {name!r}"
        if reason := SETTINGS[name].why_not(value):
            return reason
    return None


@contextlib.contextmanager
def applied(settings: Mapping[str, Any], precision: str) -> Iterator[None]:
    """Force the settings in the `with`.

    Args:
        settings: name -> value.
        precision: a key of roofline.WIDTHS; tiles are given for bf16.
    """
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(SETTINGS[name].apply(value, precision))
        yield
