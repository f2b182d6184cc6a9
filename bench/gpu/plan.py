"""The cases that `bench.gpu` runs, in their order. The most important comes first, because the budget may end the list anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from typing import Any

from ..problem import MAIN, Size
from .roofline import WIDTHS
from .variants import KINDS, TABLE, Variant

SIZES = (MAIN, Size(256, 100_000, 512), Size(1024, 8142, 2048), Size(128, 1000, 512))
#: Of the smoke runs: larger than a tile and a multiple of none; one row; fewer classes than a row of a tile;
#: no displacements; more than the fused kernels hold; a length that is no whole number of vectors.
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
COMPILE_SECONDS = 8.0  # of one torch.compile, about


@dataclass(frozen=True)
class Case:
    """Variants run on the same tensors, one after another or timed in turn."""

    precision: str  # one of WIDTHS
    size: Size
    kind: str  # one of variants.KINDS; or "smoke", "warm", "constants", "profile"
    variants: tuple[str, ...]
    seconds: float = 1.0  # to spend on the timed rounds
    graph: bool = False  # replays of a CUDA graph: what is left without the launches

    @property
    def name(self) -> str:
        """Such as `bf16 256×8142×2048 forward`."""
        return f"{self.precision} {self.size} {self.kind}" + (", graph" if self.graph else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json` in another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """The inverse of `to_json`."""
        return cls(**{**values, "size": Size(**values["size"]), "variants": tuple(values["variants"])})

    def without(self, variants: Sequence[str]) -> Case:
        """The same case with fewer variants."""
        return replace(self, variants=tuple(variant for variant in self.variants if variant not in variants))

    @property
    def compiles(self) -> int:
        """The number of its variants that torch.compile makes."""
        return sum(TABLE[variant].compiled for variant in self.variants if variant in TABLE)

    def estimate(self) -> float:
        """Seconds that it will take, roughly: to make tensors, to compile, to warm up, to measure."""
        if self.kind not in KINDS:
            return 0.5
        calls = sum(self._call(variant) for variant in self.variants)
        return 0.2 + 0.03 * len(self.variants) + 7 * calls + self.seconds + COMPILE_SECONDS * self.compiles

    def _call(self, variant: str) -> float:
        """Seconds of one call at a third of what a large GPU can do; the direct variant makes m + 1 vectors a class."""
        size, passes = self.size, 1 if self.kind == "forward" else 3
        vectors = size.m + 1 if variant.startswith("direct") else 1
        products = 2 * size.B * size.K * size.d * vectors / (2.5e14 if self.precision == "bf16" else 2e13)
        copies = 6 if variant.startswith("direct") else 1
        moved = WIDTHS[self.precision] * size.K * (size.d + size.B) * vectors * copies / 1.5e12
        return passes * (products + moved)


def supports(variant: Variant, precision: str, kind: str) -> bool:
    """True if a variant has this kind in this precision."""
    return kind in variant.kinds and precision in variant.precisions


def timed_cases(variants: Sequence[str], seconds: float = 0.5, grid: bool = False) -> list[Case]:
    """The timed cases.

    Args:
        variants: the variants asked for.
        seconds: of the rounds of each.
        grid: with all other sizes too, for a day without a limit.
    """
    sizes = [(precision, SIZES[n]) for precision, n in ORDER]
    sizes += [(p, s) for p in ("tf32", "float32") for s in SIZES if (p, s) not in sizes]
    cases = [_case(p, s, kind, variants, seconds) for p, s in sizes for kind in KINDS]
    for size in (MAIN, SIZES[3]):
        cases += [replace(_case("bf16", size, kind, variants, seconds / 2), graph=True) for kind in KINDS]
    compiled = [n for n in variants if TABLE[n].compiled]
    for size in SIZES[:2]:
        cases += [Case("bf16", size, k, ("linear", *compiled), seconds) for k in ("forward", "step")]
    if grid:
        others = sorted(product(BATCHES, CLASSES, LENGTHS), key=prod)  # so that the most of them fit
        more = [(p, Size(*s)) for p in ("bf16", "float32") for s in others if Size(*s) not in SIZES]
        cases += [_case(p, s, kind, variants, seconds) for p, s in more for kind in KINDS]
    return [case for case in cases if len(case.variants) > 1]


def _case(precision: str, size: Size, kind: str, variants: Sequence[str], seconds: float) -> Case:
    kept = [n for n in variants if supports(TABLE[n], precision, kind) and not TABLE[n].compiled]
    return Case(precision, size, kind, tuple(kept), seconds)


def smoke_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Small odd sizes for each precision that is measured, against float64."""
    precisions = list(dict.fromkeys(case.precision for case in cases))
    kept = [n for n in variants if TABLE[n].ours]
    return [
        Case(p, size, "smoke", tuple(n for n in kept if p in TABLE[n].precisions))
        for p in precisions
        for size in SMOKE
    ]


def warm_up_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """One call of all that Triton compiles for the sizes that are measured: others find it in Triton's cache."""
    names = [n for n in variants if TABLE[n].backend == "triton"]
    sizes = dict.fromkeys((case.precision, case.size) for case in cases)
    return [Case(p, s, "warm", tuple(n for n in names if p in TABLE[n].precisions)) for p, s in sizes]


def profile_cases(variants: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Each of ours, kernel by kernel, at the first two sizes that are measured."""
    sizes = list(dict.fromkeys((case.precision, case.size) for case in cases))[:2]
    return [Case(p, s, "profile", tuple(n for n in variants if TABLE[n].ours)) for p, s in sizes]


class Filter:
    """The cases that `--cases` asks for: terms such as `bf16`, `256x8142x2048`, `loss`, joined by colons; any of them may hold."""

    def __init__(self, text: str) -> None:
        """Read it.

        Raises:
            ValueError: a word is none of these.
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
        """True if it is asked for."""
        return any(
            p in (None, case.precision) and s in (None, case.size) and k in (None, case.kind)
            for p, s, k in self.terms
        )

    def own(self, variants: Sequence[str], seconds: float) -> list[Case]:
        """Cases of sizes that the plan does not have."""
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
    """A case that a CPU can try."""
    size = case.size
    if case.kind != "smoke":
        size = Size(max(size.B // 32, 2), max(size.K // 200, 3), max(size.d // 32, 4), size.m)
    return replace(case, size=size, seconds=min(case.seconds, 0.05))
