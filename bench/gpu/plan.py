"""The cases of a session, the most important first because the budget may cut the list anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from typing import Any

from ..problem import MAIN, Size
from .roofline import WIDTHS
from .variants import KINDS, TABLE, WITHOUT_TOPK, Variant

SIZES = (MAIN, Size(256, 100_000, 512), Size(1024, 8142, 2048), Size(128, 1000, 512))
#: Sizes of the smoke checks: above every tile and a multiple of none; one row; fewer classes than a tile; no
#: displacements; more displacements than the fused kernels hold; a d that is not a multiple of the vector width.
SMOKE = (
    Size(300, 200, 136),
    Size(1, 200, 136),
    Size(130, 7, 72),
    Size(100, 200, 136, 0),
    Size(300, 200, 136, 12),
    Size(100, 200, 33),
)
ORDER = (("bf16", 0), ("bf16", 1), ("float32", 0), ("bf16", 2), ("bf16", 3), ("tf32", 0), ("float32", 1))
BATCHES, CLASSES, LENGTHS = (128, 256, 1024), (1000, 8142, 100_000, 1_000_000), (512, 2048)
COMPILE_SECONDS = 8.0  # per torch.compile, about


@dataclass(frozen=True)
class Case:
    """Variants that run on the same tensors, one after another or timed in alternating rounds."""

    precision: str  # one of WIDTHS
    size: Size
    kind: str  # one of variants.KINDS; or "smoke", "warm", "constants", "profile"
    variants: tuple[str, ...]
    seconds: float = 1.0  # time for the timed rounds
    graph: bool = False  # replay from a CUDA graph, without the launch overhead

    @property
    def name(self) -> str:
        """The name, such as `bf16 256×8142×2048 forward`."""
        return f"{self.precision} {self.size} {self.kind}" + (", graph" if self.graph else "")

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `from_json` in another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """Return the case of `to_json`."""
        return cls(**{**values, "size": Size(**values["size"]), "variants": tuple(values["variants"])})

    def without(self, variants: Sequence[str]) -> Case:
        """Return the case without some of its variants."""
        return replace(self, variants=tuple(variant for variant in self.variants if variant not in variants))

    @property
    def compiles(self) -> int:
        """The number of variants that use torch.compile."""
        return sum(TABLE[variant].compiled for variant in self.variants if variant in TABLE)

    def estimate(self) -> float:
        """Estimate the seconds to create tensors, compile, warm up and measure."""
        if self.kind not in KINDS:
            return 0.5
        calls = sum(self._call(variant) for variant in self.variants)
        return 0.2 + 0.03 * len(self.variants) + 7 * calls + self.seconds + COMPILE_SECONDS * self.compiles

    def _call(self, variant: str) -> float:
        """Estimate the seconds of a call at a third of a large GPU's peak. "direct" computes m + 1 vectors per class."""
        size, passes = self.size, 3 if self.kind in ("step", "loss") else 1
        vectors = size.m + 1 if variant.startswith("direct") else 1
        products = 2 * size.B * size.K * size.d * vectors / (2.5e14 if self.precision == "bf16" else 2e13)
        copies = 6 if variant.startswith("direct") else 1
        moved = WIDTHS[self.precision] * size.K * (size.d + size.B) * vectors * copies / 1.5e12
        return passes * (products + moved)


def supports(variant: Variant, precision: str, kind: str) -> bool:
    """Return True if a variant has this kind in this precision."""
    return kind in variant.kinds and precision in variant.precisions


def timed_cases(variants: Sequence[str], seconds: float = 0.5, grid: bool = False) -> list[Case]:
    """Return the timed cases.

    Args:
        variants: names of the variants.
        seconds: time of the rounds per case.
        grid: include all sizes of the grid, for a session without a short limit.
    """
    sizes = [(precision, SIZES[n]) for precision, n in ORDER]
    sizes += [(p, s) for p in ("tf32", "float32") for s in SIZES if (p, s) not in sizes]
    cases = [_case(p, s, kind, variants, seconds) for p, s in sizes for kind in WITHOUT_TOPK]
    cases += [_case(p, s, "topk", variants, seconds) for p, s in sizes]
    for size in (MAIN, SIZES[3]):
        cases += [replace(_case("bf16", size, kind, variants, seconds / 2), graph=True) for kind in KINDS]
    compiled = [n for n in variants if TABLE[n].compiled]
    for size in SIZES[:2]:
        cases += [Case("bf16", size, k, ("linear", *compiled), seconds) for k in ("forward", "step")]
    if grid:
        others = sorted(
            product(BATCHES, CLASSES, LENGTHS), key=prod
        )  # the small ones first, so that as many as possible fit
        more = [(p, Size(*s)) for p in ("bf16", "float32") for s in others if Size(*s) not in SIZES]
        cases += [_case(p, s, kind, variants, seconds) for p, s in more for kind in KINDS]
    return [case for case in cases if len(case.variants) > 1]


def _case(precision: str, size: Size, kind: str, variants: Sequence[str], seconds: float) -> Case:
    kept = [n for n in variants if supports(TABLE[n], precision, kind) and not TABLE[n].compiled]
    return Case(precision, size, kind, tuple(kept), seconds)


def smoke_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Return the smoke checks: small odd sizes in each measured precision."""
    precisions = list(dict.fromkeys(case.precision for case in cases))
    kept = [n for n in variants if TABLE[n].ours]
    return [
        Case(p, size, "smoke", tuple(n for n in kept if p in TABLE[n].precisions))
        for p in precisions
        for size in SMOKE
    ]


def warm_up_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Return one call of each Triton variant at each measured size, to fill Triton's cache for other processes."""
    names = [n for n in variants if TABLE[n].backend == "triton"]
    sizes = dict.fromkeys((case.precision, case.size) for case in cases)
    return [Case(p, s, "warm", tuple(n for n in names if p in TABLE[n].precisions)) for p, s in sizes]


def profile_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Return the profiles of the gistops variants at the first two measured sizes."""
    sizes = list(dict.fromkeys((case.precision, case.size) for case in cases))[:2]
    return [Case(p, s, "profile", tuple(n for n in variants if TABLE[n].ours)) for p, s in sizes]


class Filter:
    """The filter of `--cases`: terms separated by commas, each a precision, a size and a kind joined by colons."""

    def __init__(self, text: str) -> None:
        """Parse the filter.

        Raises:
            ValueError: a word is neither a precision nor a size nor a kind.
        """
        self.terms: list[tuple[str | None, Size | None, str | None]] = []
        for term in text.split(","):
            precision = size = kind = None
            for word in term.strip().split(":"):
                if word in WIDTHS:
                    precision = word
                elif word in KINDS:
                    kind = word
                else:
                    size = _size(word)
            self.terms.append((precision, size, kind))

    def __call__(self, case: Case) -> bool:
        """Return True if a term matches the case."""
        return any(
            p in (None, case.precision) and s in (None, case.size) and k in (None, case.kind)
            for p, s, k in self.terms
        )

    def extra_cases(self, variants: Sequence[str], seconds: float) -> list[Case]:
        """Return the cases of sizes that the plan lacks."""
        return [
            _case(p, s, k, variants, seconds)
            for precision, s, kind in self.terms
            if s is not None and s not in SIZES
            for p in ([precision] if precision else ["bf16"])
            for k in ([kind] if kind else KINDS)
        ]


def _size(word: str) -> Size:
    try:
        return Size.parse(word)
    except ValueError:
        words = ", ".join((*WIDTHS, *KINDS))
        raise ValueError(
            f"--cases: expected {words}, or a size such as 256x8142x2048, got {word!r}"
        ) from None


def shrink_for_cpu(case: Case) -> Case:
    """Return a case that is small enough for a trial on the CPU."""
    size = case.size
    if case.kind != "smoke":
        size = Size(max(size.B // 32, 2), max(size.K // 200, 3), max(size.d // 32, 4), size.m)
    return replace(case, size=size, seconds=min(case.seconds, 0.05))
