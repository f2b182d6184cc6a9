"""What a variant can force, by name: how to force it for the calls in a `with`, and why it cannot be forced here.

A setting of code that is not there yet makes its variants absent, with the reason; it is never an error. Every
setting holds for the whole process, for the backward runs in autograd's own thread.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """One thing to force."""

    why_not: Callable[[Any], str | None]
    apply: Callable[[Any, str], contextlib.AbstractContextManager[Any]]  # value, precision


def _module(name: str) -> Any:
    return importlib.import_module(f"gistops.{name}")


def _attribute(module: str, name: str) -> Setting:
    """A number or a switch of a module."""

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

    return Setting(why_not, apply)


def _tile(kernel: str) -> Setting:
    """A tile of one of Triton's large kernels: classes, features, depth, warps, stages, as for half precision."""

    def why_not(value: Any) -> str | None:
        try:
            configs = _module("backends.triton.configs")
        except ImportError as error:
            return f"Triton does not load: {error}"
        if configs.INTERPRETED:
            return "the interpreter has tiles of its own"
        return (
            None
            if (kernel, "half") in _entries(configs)
            else f"Triton's kernels have no tiles for {kernel!r}"
        )

    @contextlib.contextmanager
    def apply(value: tuple[int, ...], precision: str) -> Iterator[None]:
        configs = _module("backends.triton.configs")
        before = configs.choose
        classes, features, depth, warps, stages = value
        if precision != "bf16":  # as many bytes in rows of float32: of what the loop goes over
            features, depth = (features, depth // 2) if kernel == "forward" else (features // 2, depth)
        tile = configs.Config(classes, features, depth, warps, stages)

        def choose(which: str, *arguments: Any) -> Any:
            return tile if which == kernel else before(which, *arguments)

        configs.choose = choose
        try:
            yield
        finally:
            configs.choose = before

    return Setting(why_not, apply)


def _entries(configs: Any) -> set[tuple[str, str]]:
    """(kernel, kind of product) that Triton's tables know."""
    return {
        (kernel, kind)
        for kernel, table in (("forward", "FORWARD"), ("centers", "CENTERS"))
        for _, kind in getattr(configs, table, {})
    }


SETTINGS: dict[str, Setting] = {
    "chunk": _attribute("operators.chunks", "CHUNK_ELEMENTS"),
    "triton chunk": _attribute("backends.triton.loss", "CHUNK_ELEMENTS"),
    "held bytes": _attribute("operators.cross_entropy", "HELD_BYTES"),
    "forward tile": _tile("forward"),
    "centers tile": _tile("centers"),
}


def why_not(settings: Mapping[str, Any]) -> str | None:
    """Why these settings cannot be forced here, or None."""
    for name, value in settings.items():
        if name not in SETTINGS:
            return f"nothing can force {name!r} yet"
        if reason := SETTINGS[name].why_not(value):
            return reason
    return None


@contextlib.contextmanager
def applied(settings: Mapping[str, Any], precision: str) -> Iterator[None]:
    """Force them.

    Args:
        settings: name -> value.
        precision: one of plan.WIDTHS; tiles are given for bf16.
    """
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(SETTINGS[name].apply(value, precision))
        yield
