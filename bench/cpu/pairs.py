"""Times of a call in alternation with a baseline, and the number of rounds that a time allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

#: Rounds of a case: at most, at least, and at least if a round takes longer than the time of a case.
MOST, LEAST, FEW = 200, 5, 3
#: A case is left out if a round takes so many times as long as the time of a case.
TOO_LONG = 5

#: Times a call in rounds, each after a call of a setup; takes both and the number of rounds, and returns the seconds.
Pedantic = Callable[[Callable[[], Any], Callable[[], None], int], Sequence[float]]


class Pairs(NamedTuple):
    """The medians of a case over its rounds: the ratio of a pair, and the seconds of the call."""

    ratio: float
    seconds: float
    n: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({1e3 * self.seconds:.3g} ms; {self.n})"


class TooSlow(Exception):
    """The fewest rounds would take several times as long as a case may take."""


def rounds(pair: float, seconds: float) -> int:
    """Return how many pairs that take `pair` are measured in about `seconds`; 0 if even a few would take too long."""
    if pair > TOO_LONG * seconds:
        return 0
    fewest = FEW if pair > seconds else LEAST
    return max(fewest, min(int(seconds / pair), MOST))


def measure(
    run: Callable[[], Any],
    baseline: Callable[[], Any],
    seconds: float,
    pedantic: Pedantic,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Time `run` and `baseline` in turn.

    Both calls of a pair see the same state of the machine, so that the median ratio of the pairs is reliable even if the
    times themselves are not. The first calls allocate; they and those that decide how many rounds there are do not count.
    They must not compile: their times decide whether a case is too slow.

    Raises:
        TooSlow: `rounds` gives no rounds for calls as slow as the first ones.
    """

    def timed(call: Callable[[], Any]) -> float:
        begin = clock()
        call()
        return clock() - begin

    first = timed(baseline), timed(run)
    if not rounds(sum(first), seconds):
        raise TooSlow(f"left out: a call takes {first[1]:.1f} s, the baseline {first[0]:.1f} s")
    pair = sum(first) if sum(first) > seconds else timed(baseline) + timed(run)
    n = max(FEW, rounds(pair, seconds))
    baselines: list[float] = []
    times = pedantic(run, lambda: baselines.append(timed(baseline)), n)
    ratio = statistics.median(b / a for a, b in zip(baselines[-n:], times, strict=True))
    return Pairs(ratio, statistics.median(times), n)
