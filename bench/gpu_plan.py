"""What `python -m bench.gpu` measures, in which order, and the least time that physics allows for it.

The order is that of importance, because the budget may end the list anywhere: what comes first is what the README
claims. torch.compile takes seconds for each size, more than all the measuring there, so that most sizes are visited
without the compiled forms first and again with them at the end, if there is time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

from .forms import Size

#: The size of the stated targets: iNaturalist 2018's classes, ResNet-50's features.
MAIN = Size(256, 8142, 2048)

OURS = ("cuda", "triton")
PLAIN = ("linear", *OURS, "direct")
COMPILED = ("split compiled", "direct compiled")
#: Our head at m = 0, which is cosines with a temperature.
HELD = tuple(f"{name}, m=0" for name in OURS)
#: The loss without its logits: ours, and of libraries that of a plain linear layer and of cosines; and HELD beside them.
LOSSES = (
    *HELD,
    *(f"{name} loss{head}" for name in OURS for head in ("", ", m=0")),
    *(
        f"{name}{head}"
        for name in ("torch linear_cross_entropy", "CCE", "Liger")
        for head in ("", ", cosine")
    ),
)

BATCHES, CLASSES, LENGTHS = (128, 256, 1024), (1000, 8142, 100_000, 1_000_000), (512, 2048)

#: Precision -> bytes of an element of input and centres. "float32" is torch's default, without tf32.
WIDTHS = {"bf16": 2, "float32": 4, "tf32": 4}


@dataclass(frozen=True)
class Case:
    """Forms timed in turn with one another on the same tensors."""

    precision: str  # one of WIDTHS
    size: Size
    kind: str  # "forward", or "step" for forward, cross-entropy and backward
    forms: tuple[str, ...]
    seconds: float  # to spend on the timed rounds
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
        """What `to_json` made."""
        return cls(**{**values, "size": Size(**values["size"]), "forms": tuple(values["forms"])})

    def without(self, forms: Sequence[str]) -> Case:
        """The same case with fewer forms."""
        kept = tuple(form for form in self.forms if form not in forms)
        return Case(self.precision, self.size, self.kind, kept, self.seconds, self.graph)

    def estimate(self, compile_seconds: float) -> float:
        """Seconds that it will take, roughly: to make tensors, to compile, to warm up, to measure.

        Args:
            compile_seconds: what one torch.compile has taken so far.
        """
        compiled = sum(form in COMPILED for form in self.forms)
        calls = sum(self._call(form) for form in self.forms)
        return 0.3 + 0.05 * len(self.forms) + 7 * calls + self.seconds + compiled * compile_seconds

    def _call(self, form: str) -> float:
        """Seconds of one call at a third of what a large GPU can do; the direct form makes m + 1 vectors a class."""
        size, passes = self.size, 1 if self.kind == "forward" else 3
        vectors = size.m + 1 if form.startswith("direct") else 1
        products = 2 * size.B * size.K * size.d * vectors / (2.5e14 if self.precision == "bf16" else 2e13)
        copies = 6 if form.startswith("direct") else 1
        moved = WIDTHS[self.precision] * size.K * (size.d + size.B) * vectors * copies / 1.5e12
        return passes * (products + moved)


def plan() -> list[Case]:
    """Every case, the most important first."""
    return list(_plan())


def _plan() -> Iterator[Case]:
    compared = (
        ("bf16", MAIN),
        ("float32", MAIN),
        ("bf16", Size(256, 100_000, 512)),
        ("bf16", Size(256, 1000, 2048)),
        ("bf16", Size(128, 8142, 2048)),
        ("bf16", Size(1024, 8142, 2048)),
    )
    for number, (precision, size) in enumerate(compared):
        yield from _passes(precision, size, PLAIN + COMPILED, 1.0 if number else 3.0)
    yield from _passes("tf32", MAIN, ("linear", *OURS), 0.5, losses=False)
    for size in (MAIN, Size(128, 1000, 512)):
        for kind in ("forward", "step"):
            yield Case("bf16", size, kind, ("linear", *OURS), 0.5, graph=True)
    rest = [
        (precision, Size(B, K, d))
        for precision in ("bf16", "float32")
        for B, K, d in sorted(product(BATCHES, CLASSES, LENGTHS), key=prod)  # so that the most of them fit
        if (precision, Size(B, K, d)) not in compared
    ]
    for precision, size in rest:
        yield Case(precision, size, "forward", PLAIN, 0.5)
        yield Case(precision, size, "step", PLAIN + tuple(f for f in LOSSES if f not in HELD), 0.5)
    for precision, size in rest:
        yield from _passes(precision, size, ("linear", *OURS, *COMPILED), 0.5, losses=False)


def _passes(
    precision: str, size: Size, forms: tuple[str, ...], seconds: float, losses: bool = True
) -> Iterator[Case]:
    yield Case(precision, size, "forward", forms, seconds)
    yield Case(precision, size, "step", forms + LOSSES if losses else forms, seconds)


class Work(NamedTuple):
    """What a phase must do at least. A phase begins when the one before has ended, as the loss needs all logits."""

    flops: int  # of matrix products, a multiplication and an addition counted as two
    bytes: int  # each input read once, each output written once


def backend_of(form: str) -> str:
    """The backend of a form of ours; of others, their name."""
    return form.removesuffix(", m=0").removesuffix(" loss")


def is_ours(form: str) -> bool:
    return backend_of(form) in OURS


def work(form: str, size: Size, kind: str, width: int) -> list[Work] | None:
    """The phases of one form; None for the libraries' losses.

    Every form of the constellation is held against the same count, that of the fused algebra: one large product and
    thin ones. A form that does more work than that is further from its roofline, as it should be.

    Args:
        form: its name.
        size: B, K, d, m.
        kind: "forward" or "step".
        width: bytes of an element of input, centres and displacements.
    """
    if form in LOSSES and not is_ours(form):
        return None
    B, K, d, _ = size.B, size.K, size.d, size.m
    m = 0 if form.endswith("m=0") else size.m
    main = 2 * B * K * d
    if form == "linear":
        arguments, logits = width * d * (B + K), width * B * K
        forward = Work(main, arguments + logits)
        backward = Work(2 * main, logits + 2 * arguments)
        loss = Work(0, 2 * logits)
    elif form.removesuffix(", m=0").endswith(" loss"):
        thin, arguments = 2 * (B + K) * (m + 1) * d, width * d * (B + K + m)
        return [
            Work(main + thin, arguments),
            Work(2 * main + 2 * thin, 2 * arguments),
        ]  # no logits to read or write
    else:
        thin = 2 * (B + K) * (m + 1) * d  # with the bare centre's and the feature's own norms
        arguments, logits, slots = width * d * (B + K + m), 4 * B * K, B * K
        forward = Work(main + thin, arguments + logits + slots)
        backward = Work(2 * main + 2 * thin, 2 * logits + slots + 2 * arguments)
        loss = Work(0, 2 * logits)
    return [forward] if kind == "forward" else [forward, loss, backward]


def floor_ms(phases: Sequence[Work], flops: float, bandwidth: float) -> float:
    """The roofline: milliseconds that the phases take at the measured ceilings.

    Args:
        phases: what is done, one after another.
        flops: per second, of a large matrix product in this precision.
        bandwidth: bytes per second, read and written.
    """
    return 1e3 * sum(max(phase.flops / flops, phase.bytes / bandwidth) for phase in phases)
