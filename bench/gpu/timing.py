"""Times on a GPU: CUDA events, a cold L2, a queue that never runs dry, variants in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

Run = Callable[[], object]
Clock = Callable[[], float]
LONGEST_SPIN = 20.0  # milliseconds


class Sample(NamedTuple):
    """One timed call."""

    ms: float
    behind: (
        bool  # the GPU began before the CPU had queued the whole call, so that launches may be in the time
    )


class Timer(Protocol):
    """How one device is timed."""

    def synchronize(self) -> None:
        """Wait for the device; raises what a kernel has done wrong."""

    def host_ms(self, run: Run) -> float:
        """Milliseconds that the CPU takes to queue a call."""

    def measure(self, run: Run, spin: float) -> Sample:
        """Time one call, with a cold cache."""

    def peak(self, run: Run) -> int | None:
        """Bytes that one call adds at its peak, results included; None where that is not known."""


class CudaTimer:
    """Times calls on the current CUDA device."""

    def __init__(self) -> None:
        cache = max(torch.cuda.get_device_properties().L2_cache_size, 16 << 20)
        self._dirty = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
        self._clean = torch.zeros(2 * cache // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cycles_per_ms = 1e6
        torch.cuda._sleep(1_000_000)  # loads its kernel
        self._cycles_per_ms = 2e7 / self._events(lambda: torch.cuda._sleep(20_000_000))

    def _events(self, run: Run) -> float:
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def host_ms(self, run: Run) -> float:
        times = []
        for _ in range(3):
            self.synchronize()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        self.synchronize()
        return 1e3 * min(times)

    def measure(self, run: Run, spin: float) -> Sample:
        """Time one call between two events.

        The L2 is flushed by writing a buffer of twice its size. A second one is read after it: else the timed call
        would have to write back what the first left in the cache. Then the GPU spins while the CPU queues the call.
        """
        self._dirty.zero_()
        torch.sum(self._clean, dim=0, out=self._sum)
        torch.cuda._sleep(int(spin * self._cycles_per_ms))
        self._begin.record()
        run()
        self._end.record()
        behind = self._begin.query()
        self._end.synchronize()
        return Sample(self._begin.elapsed_time(self._end), behind)

    def peak(self, run: Run) -> int | None:
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


class HostTimer:
    """Times calls on the CPU, so that the bench itself can be tried and tested without a GPU."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def host_ms(self, run: Run) -> float:
        return 0.0

    def measure(self, run: Run, spin: float) -> Sample:
        begin = time.perf_counter()
        run()
        return Sample(1e3 * (time.perf_counter() - begin), False)

    def peak(self, run: Run) -> int | None:
        return None


def interleave(
    measures: Mapping[str, Callable[[], Sample]],
    seconds: float,
    failed: Callable[[str, Exception], None],
    limit: str | None = None,
    clock: Clock = time.perf_counter,
    minimum: int = 5,
    maximum: int = 100,
) -> dict[str, dict[int, Sample]]:
    """Call each measure once in each round, so that all see the same state of the machine.

    The order turns with the rounds, so that none is always the one that follows a certain other. A variant that has had
    its share of the time and its minimum of rounds rests, so that slow ones do not take the fast ones' rounds.

    Args:
        measures: name -> one timed call.
        seconds: to spend in all, beyond the minimum of rounds.
        failed: called with a name and what its measure raised; the variant is then left out.
        limit: the variant that the others are compared with, which never rests.
        clock: seconds.
        minimum: rounds of each variant at least.
        maximum: rounds at most.

    Returns:
        name -> round -> sample: pairs of one round can be compared.
    """
    samples: dict[str, dict[int, Sample]] = {name: {} for name in measures}
    spent = dict.fromkeys(measures, 0.0)
    active = list(measures)
    begin = clock()
    for number in range(maximum):
        if number >= minimum and clock() - begin >= seconds:
            break
        turn = number % max(1, len(active))
        for name in active[turn:] + active[:turn]:
            start = clock()
            try:
                samples[name][number] = measures[name]()
            except Exception as error:
                failed(name, error)
                del samples[name]
            spent[name] += clock() - start
        share = seconds / max(1, len(measures))
        active = [n for n in active if n in samples]
        active = [n for n in active if n == limit or len(samples[n]) < minimum or spent[n] < share]
        if not any(n != limit or len(samples) == 1 for n in active):
            break
    return samples


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def loop_ms(timer: Timer, run: Run, ms: float) -> float:
    """Milliseconds a call where calls follow one another as the CPU can launch them: what small problems take.

    Args:
        timer: of the device.
        run: the call.
        ms: what it takes at least, on the GPU or to be launched.
    """
    calls = int(min(max(3.0, 50.0 / max(ms, 1e-3)), 50.0))
    timer.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    timer.synchronize()
    return 1e3 * (time.perf_counter() - begin) / calls


def captured(run: Run) -> Run:
    """Replays of a CUDA graph of `run`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first calls must not be made in the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def spin_for(host_ms: float) -> float:
    """Milliseconds for which the device is kept busy while a call is queued; bounded, for a call that waits for it."""
    return min(2 * host_ms + 0.05, LONGEST_SPIN)


class NoCollection:
    """Keeps Python's garbage collector from running among timed calls."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
