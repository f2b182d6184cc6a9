"""Measured constants of the device: bandwidth, matmul rate, launch overhead, and F.linear at aligned and odd K."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..problem import MAIN, Size, make_tensors
from . import timing
from .plan import Case, shrink_for_cpu
from .timing import Run, Timer

#: Name -> unit, in the order of measurement.
CONSTANTS = {
    "empty": "ms between two adjacent events: included in every time, never subtracted",
    "copy": "bytes/s, read plus written",
    "mm bf16": "flop/s",
    "mm tf32": "flop/s",
    "mm float32": "flop/s",
    "launch gap": "ms per kernel in a chain of dependent kernels, with a full queue",
    "launch gap, graph": "ms, the same chain replayed from a CUDA graph",
    "L2 read": "bytes/s, all multiprocessors together reading the same 16 MiB repeatedly",
    **{
        f"linear {kind} K={K}": "ms, bf16, F.linear" + (" and F.cross_entropy" if kind == "step" else "")
        for kind in ("forward", "step")
        for K in (8142, 8144, 8192)
    },
    "mm float32 out": "ms, bf16 matmul of 256×2048×8142 with float32 output",
    "mm float32 out, ld 8144": "ms, the same matmul into rows of 8144 elements",
    "mm float32 out, class-major": "ms, the same matmul transposed, [8142, 256]",
}
Measured = dict[str, Any]


class DeviceConstants:
    """Measures the constants of one device."""

    def __init__(self, timer: Timer, device: str) -> None:
        """Prepare.

        Args:
            timer: timer of the device.
            device: "cuda", or "cpu" for a trial with tiny tensors.
        """
        self.timer, self.device = timer, device
        self.size = MAIN if device == "cuda" else shrink_for_cpu(Case("bf16", MAIN, "constants", ())).size

    def measure(self, name: str) -> Measured:
        """Measure a constant. Returns `value` in the unit of CONSTANTS and `ms`, or `skipped` with the reason."""
        if name in ("launch gap, graph", "L2 read") and self.device != "cuda":
            return {"skipped": "needs a GPU"}
        if name == "empty":
            return self._plain(lambda: None, 20)
        if name == "copy":
            return self._copy()
        if name.startswith("launch gap"):
            return self._gap(name.endswith("graph"))
        if name == "L2 read":
            return self._l2()
        if name.startswith("linear"):
            _, kind, K = name.split()
            return self._linear(kind, int(K.removeprefix("K=")))
        if name.startswith("mm float32 out"):
            return self._float32_output(name.removeprefix("mm float32 out").strip(", "))
        return self._product(name.removeprefix("mm "))

    def _ms(self, run: Run, count: int = 20) -> float:
        for _ in range(3):
            run()
        spin = timing.spin_for(self.timer.host_ms(run))
        return statistics.median(self.timer.measure(run, spin).ms for _ in range(count))

    def _plain(self, run: Run, count: int = 20) -> Measured:
        ms = self._ms(run, count)
        return {"ms": ms, "value": ms}

    def _copy(self) -> Measured:
        count = 1 << 30 if self.device == "cuda" else 1 << 20
        source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        ms = self._ms(lambda: target.copy_(source))
        return {"ms": ms, "value": 2e3 * count / ms}

    def _product(self, precision: str) -> Measured:
        """Time a matmul of random matrices; a matmul of zeros may be faster."""
        side = 8192 if self.device == "cuda" else 64
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            ms = self._ms(lambda: torch.mm(a, b, out=out), 10)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        return {"ms": ms, "value": 2e3 * side**3 / ms}

    def _gap(self, graph: bool) -> Measured:
        """Time a chain of 200 one-element kernels, each of which depends on the previous kernel."""
        count, x = 200, torch.zeros(1, device=self.device)

        def run() -> None:
            for _ in range(count):
                x.add_(1)

        ms = self._ms(timing.captured(run) if graph else run, 5) / count
        return {"ms": ms, "value": ms}

    def _l2(self) -> Measured:
        try:
            from .l2_read import make_l2_reader  # Triton
        except ImportError as error:
            return {"skipped": f"Triton does not load: {error}"}
        run, count = make_l2_reader(16 << 20)
        ms = self._ms(run, 10)
        return {"ms": ms, "value": 1e3 * count / ms}

    def _linear(self, kind: str, K: int) -> Measured:
        size = Size(self.size.B, K if self.device == "cuda" else self.size.K, self.size.d)
        x, w, _, _ = make_tensors(size, torch.bfloat16, self.device)
        labels = torch.arange(size.B, device=self.device) % size.K

        def step() -> None:
            x.grad = w.grad = None
            F.cross_entropy(F.linear(x, w).float(), labels).backward()

        def forward() -> None:
            with torch.no_grad():
                F.linear(x, w)

        return self._plain(step if kind == "step" else forward, 30)

    def _float32_output(self, layout: str) -> Measured:
        """Time a half-precision matmul with float32 output."""
        if self.device != "cuda":
            return {"skipped": "needs a GPU"}
        x, w, _, _ = (a.detach() for a in make_tensors(self.size, torch.bfloat16, self.device))
        if layout == "class-major":
            x, w = w, x
        stride = -(-len(w) // 16) * 16 if layout == "ld 8144" else len(w)
        out = torch.empty(len(x), stride, device=self.device)[:, : len(w)]
        return self._plain(lambda: torch.ops.aten.mm.dtype_out(x, w.T, torch.float32, out=out), 30)


def roofline_ceilings(found: dict[str, Measured]) -> dict[str, float]:
    """Return the constants of the roofline by the names that roofline.py uses."""
    names = {"bandwidth": "copy", "events_ms": "empty"} | {p: f"mm {p}" for p in ("bf16", "tf32", "float32")}
    return {name: found[c]["value"] for name, c in names.items() if "value" in found.get(c, {})}


def summary(found: dict[str, Measured]) -> Iterator[str]:
    """Yield a line per constant."""
    units: dict[str, Callable[[float], str]] = {
        "bytes": lambda v: f"{v / 1e9:.0f} GB/s",
        "flop/": lambda v: f"{v / 1e12:.1f} TFLOP/s",
    }
    for name, one in found.items():
        show = units.get(CONSTANTS[name][:5], lambda v: f"{1e3 * v:.1f} µs")
        yield f"- {name}: " + (
            show(one["value"]) if "value" in one else one.get("skipped") or one.get("failed", "?")
        )
