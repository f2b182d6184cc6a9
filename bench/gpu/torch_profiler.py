"""torch.profiler over a few calls of a variant: its kernels, their launches and their times."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..problem import Tensors
from . import calls
from .plan import supports
from .variants import TABLE

CALLS = 5
COLUMNS = ("precision", "size", "kind", "variant", "us_each", "us_per_call", "launches_per_call", "kernel")


def profile_kernels(name: str, precision: str, arguments: Tensors, device: str) -> dict[str, Any]:
    """Return per kind the kernels, the longest first: name, launches per call and µs per call."""
    found: dict[str, Any] = {}
    on_gpu = device == "cuda"
    for kind in TABLE[name].kinds:
        if not supports(TABLE[name], precision, kind):
            continue
        run = calls.make_call(name, kind, arguments, precision)
        for _ in range(2):
            run()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(CALLS):
                run()
            if on_gpu:
                torch.cuda.synchronize()
        rows = []
        for event in profiler.key_averages():
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if us > 0 and not (on_gpu and event.device_type == torch.autograd.DeviceType.CPU):
                rows.append({"kernel": event.key, "launches": event.count / CALLS, "us": us / CALLS})
        found[kind] = sorted(rows, key=lambda row: -row["us"])
    return found


def kernels_csv(results: list[dict[str, Any]]) -> str:
    """Format kernels.csv."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(_rows(results))
    return text.getvalue()


def _rows(results: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for result in results:
        size = "x".join(str(n) for n in result["case"]["size"].values())
        for variant, found in result["variants"].items():
            for kind, rows in found.get("kernels", {}).items():
                for row in rows:
                    each = row["us"] / max(row["launches"], 1e-9)
                    numbers = (f"{each:.2f}", f"{row['us']:.2f}", f"{row['launches']:g}")
                    yield (result["case"]["precision"], size, kind, variant, *numbers, row["kernel"])
