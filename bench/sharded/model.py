"""The cost of a loss step over sharded classes: work over rates, bytes over a link, bytes of memory.

Everything is per process. A step is the forward and backward of `head.loss` with m displacements and a learned tau, where
features, centers, displacements and tau require a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..problem import Size

KEPT_BYTES = 2 << 30  # of scores that a GPU keeps from the forward to the backward
PARKED_CLASSES = 33_792  # fewer classes of a GPU do not park their scores in the gradient of the centers
BLOCK_ROWS = 256  # rows per block of the CPU kernels
Scores = Literal["parked", "kept", "recomputed"]


@dataclass(frozen=True)
class Case:
    """A problem on a number of processes; `size.B` counts the rows of the joint batch."""

    size: Size
    ranks: int
    on_gpu: bool = False  # with features in half precision; on the CPU all is float32

    @property
    def classes(self) -> int:
        """The classes of the largest shard."""
        return -(-self.size.K // self.ranks)

    @property
    def itemsize(self) -> int:
        """The bytes per element of the features, and of the centers that are multiplied."""
        return 2 if self.on_gpu else 4

    def __str__(self) -> str:
        return f"{self.size} on {self.ranks}"


class Work(NamedTuple):
    """The work of one process in one step."""

    calls: float  # 1: for the time that does not depend on sizes
    flops: float  # of matrix products
    pairs: float  # pairs of a row and a class
    bytes: float  # read from and written to memory


class Rates(NamedTuple):
    """Seconds per unit of each kind of work."""

    calls: float = 0.0
    flops: float = 0.0
    pairs: float = 0.0
    bytes: float = 0.0

    def seconds(self, work: Work) -> float:
        return sum(rate * amount for rate, amount in zip(self, work, strict=True))


class Link(NamedTuple):
    """The connection between two processes, in one direction."""

    latency: float  # seconds per message
    bandwidth: float  # bytes per second

    def seconds(self, collectives: Sequence[Collective], ranks: int) -> float:
        messages = sum(c.messages(ranks) for c in collectives)
        return messages * self.latency + sum(c.sent(ranks) for c in collectives) / self.bandwidth


class Collective(NamedTuple):
    """A collective by the ring algorithm."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    bytes: int  # of the tensor of all processes: gathered, scattered or reduced
    passes: int  # times that the bytes go around the ring: 2 for an all-reduce

    def sent(self, ranks: int) -> float:
        """Return the bytes that a process sends."""
        return self.passes * self.bytes * (ranks - 1) / ranks

    def messages(self, ranks: int) -> int:
        """Return the number of messages that a process sends, one after another."""
        return self.passes * (ranks - 1)


def collectives(case: Case) -> list[Collective]:
    """Return the collectives of a step with equal batches, in their order."""
    (B, d, m), W = (case.size.B, case.size.d, case.size.m), case.ranks
    if W == 1:
        return []
    sums = 3 if case.on_gpu else 2  # of exponentials; the target's logit, or its loss and log-sum-exp
    scatter = 1 if case.on_gpu else 2  # gloo scatters by an all-reduce, NCCL does not
    return [
        Collective("all_gather", W * 4 * 8, 1),  # sizes and agreement
        Collective("all_gather", B * d * case.itemsize, 1),  # features
        Collective("all_gather", B * 8, 1),  # targets
        Collective("all_reduce", B * 4, 2),  # largest log-sum-exp
        Collective("all_reduce", sums * B * 4, 2),
        Collective("all_reduce", 4, 2),  # gradient of the loss
        Collective("reduce_scatter", B * d * 4, scatter),  # gradient of the features
        Collective("all_reduce", (m * d + 1) * 4, 2),  # gradients of displacements and tau
    ]


def sent(case: Case) -> float:
    """Return the bytes that a process sends in a step."""
    return sum(c.sent(case.ranks) for c in collectives(case))


def stashed_rows(size: Size) -> int:
    """Return the rows whose scores the CPU keeps in the gradient of the centers (`Stash`, csrc/cpu/cross_entropy.h)."""
    room = (size.d * 4 - (size.m + 1) * 4) // 5
    return size.B if room >= size.B else max(room, 0) // BLOCK_ROWS * BLOCK_ROWS


def cpu_work(case: Case) -> Work:
    """Return the work of the CPU kernels: three products, and a fourth for rows whose scores are not kept."""
    size, K = case.size, case.classes
    rows = 4 * size.B - stashed_rows(size)
    # The centers are read by the product of the forward and by two of the backward; the gradient is written.
    return Work(1, 2 * rows * K * size.d, size.B * K, 4 * K * size.d * 4)


def gpu_work(case: Case, scores: Scores | None = None) -> Work:
    """Return the work of the CUDA kernels in half precision: products, and the bytes of the table in csrc/README.md.

    The norms, three products and the gradient's kernel pass over the centers or their gradient. A score is written in
    float32 by the product, read and rewritten with the log-sum-exp, and read to make its weight of two bytes, which the
    next two products read. Scores that are not kept are recomputed.

    Args:
        case: the problem.
        scores: their place between forward and backward; default: that which gistops chooses.
    """
    size, K = case.size, case.classes
    pairs, elements = size.B * K, K * size.d
    again = int((scores or scores_on_gpu(case)) == "recomputed")
    flops = (6 + 2 * again) * pairs * size.d
    return Work(1, flops, pairs, (5 + again) * elements * case.itemsize + (22 + 4 * again) * pairs)


def scores_on_gpu(case: Case) -> Scores:
    """Return the place of the scores between forward and backward on NVIDIA GPUs in half precision."""
    size, K = case.size, case.classes
    if K >= PARKED_CLASSES and size.d >= 2 * size.B and size.m < 8:
        return "parked"
    return "kept" if size.B * K * 5 <= KEPT_BYTES else "recomputed"


class Memory(NamedTuple):
    """Bytes of one process."""

    parameters: int
    gradients: int
    optimizer: int
    half: int  # copies of the centers and of their gradient in half precision, with autocast
    rows: int  # the joint batch: features, their gradient, and the sums of each row

    @property
    def total(self) -> int:
        return sum(self)


def memory(case: Case, states: int = 1) -> Memory:
    """Return the memory of the head with float32 parameters; states: 1 for momentum, 2 for AdamW."""
    elements = case.classes * case.size.d
    half = 2 * 2 * elements if case.itemsize == 2 else 0
    rows = case.size.B * (case.size.d * (case.itemsize + 4) + 64)
    return Memory(4 * elements, 4 * elements, 4 * states * elements, half, rows)


def optimizer_bytes(case: Case, states: int = 1) -> int:
    """Return the bytes that the optimizer reads and writes: parameter and states both ways, the gradient once."""
    return 4 * case.classes * case.size.d * (3 + 2 * states)


def fit(points: Sequence[tuple[Work, float]], kinds: Sequence[str]) -> Rates:
    """Return the rates with the least squared relative errors; no rate is negative.

    Args:
        points: the work and the measured seconds of steps.
        kinds: the fields of `Work` that take time; the others are free.
    """
    kinds = list(kinds)
    while True:
        rows = [[getattr(work, kind) / seconds for kind in kinds] for work, seconds in points]
        matrix = torch.tensor(rows, dtype=torch.float64)
        scale = matrix.norm(dim=0)  # the kinds differ by many powers of ten
        found = torch.linalg.lstsq(matrix / scale, torch.ones(len(points), 1, dtype=torch.float64)).solution
        rates = dict(zip(kinds, (found[:, 0] / scale).tolist(), strict=True))
        worst = min(rates, key=lambda kind: rates[kind] * float(scale[kinds.index(kind)]))
        if rates[worst] >= 0:
            return Rates(**rates)
        kinds.remove(worst)


def fit_link(points: Sequence[tuple[Case, float]]) -> Link:
    """Return the link with the least squared relative errors, for measured seconds of the collectives of cases."""

    def amounts(case: Case) -> Work:
        found = collectives(case)
        return Work(sum(c.messages(case.ranks) for c in found), 0, 0, sent(case))

    rates = fit([(amounts(case), seconds) for case, seconds in points], ["calls", "bytes"])
    return Link(rates.calls, 1 / rates.bytes if rates.bytes else float("inf"))
