"""The report of `python -m gistops.info`: what is built, what is chosen, and why."""

from __future__ import annotations

import os
import platform
import warnings
from typing import Any

import torch

from . import __version__, backends
from ._toolchain import BuildError, find_compiler, host_machine
from .backends import native


def _backend(name: str, status: native.Status) -> dict[str, Any]:
    if reason := backends.why_not(name):
        return {"available": False, "reason": reason}
    reasons = {
        "cpu": status.reason,
        "cuda": f"kernels for {status.cuda}: {status.path}",
        "triton": "compiled by Triton when first called",
        "reference": "plain PyTorch, on any device",
    }
    return {"available": True, "reason": reasons[name]}


def _cpu(status: native.Status) -> dict[str, str]:
    if not status.loaded:
        return {"instruction set": "none: the compiled ops are not loaded"}
    names = ("instruction set", "float32 products", "bfloat16 products", "float16 products")
    return dict(zip(names, str(torch.ops.gistops.cpu_capability()).splitlines(), strict=True))


def _compiler(status: native.Status) -> str:
    if status.compiler:
        return status.compiler
    try:
        return " ".join(find_compiler())
    except BuildError as error:
        return f"none: {error}"


def mismatch(built_for: str | None, running: str) -> str | None:
    """Return a note if the ops were built for another version of torch than the running one, otherwise None."""
    if built_for is None or built_for == running:
        return None
    return (
        f"the ops were built for torch {built_for}, you have {running}. They use the stable ABI and "
        f"should work with both; {native.REINSTALL}."
    )


def _chosen(device: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says why
        return backends.choose(device, None)


def _cache_folder() -> str:
    try:
        return str(native.cache_dir())
    except BuildError as error:
        return str(error)


def info() -> dict[str, Any]:
    """Return what `python -m gistops.info` prints. Loads the compiled ops, and compiles them if needed."""
    status = native.load()
    return {
        "versions": {
            "gistops": __version__,
            "python": f"{platform.python_version()} ({host_machine()}, {platform.system()})",
            "torch, running": torch.__version__,
            "torch, built for": status.built_for or "nothing is built",
            "compiler": _compiler(status),
        },
        "backends": {name: _backend(name, status) for name in backends.NAMES},
        "cpu": {
            **_cpu(status),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "chosen": {
            device: _chosen(device) for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
        },
        "cache": {"folder": _cache_folder(), "sources": str(native.source_dir())},
        "mismatch": mismatch(status.built_for, torch.__version__),
        "last load error": status.error,
    }


def render(facts: dict[str, Any]) -> str:
    """Return `info()` as text."""
    lines = []
    rows = {**facts["versions"], **facts["cpu"], "cache folder": facts["cache"]["folder"]}
    rows["C++ sources"] = facts["cache"]["sources"]
    rows["last load error"] = facts["last load error"] or "none"
    width = max(map(len, rows))
    indent = "\n" + " " * (width + 2)
    lines += [f"{name:<{width}}  {str(value).replace(chr(10), indent)}" for name, value in rows.items()]
    lines += ["", f"{'backend':<{width}}  available  why"]
    for name, status in facts["backends"].items():
        available = "yes" if status["available"] else "no"
        reason = status["reason"].replace("\n", indent + " " * 11)
        lines.append(f"{name:<{width}}  {available:<9}  {reason}")
    lines += ["", *(f"Chosen for tensors on {device!r}: {name}" for device, name in facts["chosen"].items())]
    if facts["mismatch"]:
        lines += ["", f"Note: {facts['mismatch']}"]
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(render(info()))


if __name__ == "__main__":
    main()
