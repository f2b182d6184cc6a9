"""The hardware and the versions that a measurement belongs to."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """Return the CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    model = fields.get("model name") or platform.processor() or platform.machine()
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return model + family


def hardware() -> str:
    """Return the CPU, its threads, the GPU if there is one, and the versions, on one line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )
