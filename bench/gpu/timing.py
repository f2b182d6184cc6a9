"""Timing on a GPU: CUDA events, a cold L2, a full queue, variants in alternating rounds."""

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
        bool  # the GPU began before the CPU had queued the whole call, so that the time may include launches
    )


class Timer(Protocol):
    """The timer of a device."""

    def synchronize(self) -> None:
        """Wait for the device. Raises the errors of its kernels."""

    def host_ms(self, run: Run) -> float:
        """Return the milliseconds that the CPU takes to queue a call."""

    def measure(self, run: Run, spin: float) -> Sample:
        """Time one call, with a cold cache."""

    def peak(self, run: Run) -> int | None:
        """Return the peak memory of a call in bytes, including its results; None if unknown."""


class CudaTimer:
    """The timer of the current CUDA device."""

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

        Writing a buffer of twice the L2's size flushes the L2. Reading a second buffer then evicts the dirty lines, which
        the timed call would otherwise write back. Then the GPU spins while the CPU queues the call.
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
    """The timer of the CPU, for trials and tests of the bench without a GPU."""

    def synchronize(self) -> None:
        """Do nothing: calls on the CPU are synchronous."""

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
    """Time each variant once per round, so that all variants see the same state of the machine.

    The order rotates with the rounds, so that no variant always follows the same other one. A variant rests when it has
    used its share of the time and has its minimum of rounds, so that slow variants leave time to fast ones.

    Args:
        measures: name -> function that times one call.
        seconds: total time, beyond the minimum of rounds.
        failed: called with a name and the exception of its measure; the variant is then excluded.
        limit: name of the baseline variant, which never rests.
        clock: returns seconds.
        minimum: minimal number of rounds per variant.
        maximum: maximal number of rounds.

    Returns:
        name -> round -> sample: the samples of one round can be compared.
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
    """Return the first quartile, the median and the third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def loop_ms(timer: Timer, run: Run, ms: float) -> float:
    """Return the milliseconds per call in a loop: small calls are limited by the CPU's launches.

    Args:
        timer: timer of the device.
        run: the call.
        ms: lower bound of its time, on the GPU or for its launches.
    """
    calls = int(min(max(3.0, 50.0 / max(ms, 1e-3)), 50.0))
    timer.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    timer.synchronize()
    return 1e3 * (time.perf_counter() - begin) / calls


def captured(run: Run) -> Run:
    """Capture `run` in a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls may compile and allocate, which a capture forbids
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def spin_for(host_ms: float) -> float:
    """Return the milliseconds of spinning while the CPU queues a call. Bounded, because a call may synchronize."""
    return min(2 * host_ms + 0.05, LONGEST_SPIN)


class NoCollection:
    """Disables Python's garbage collector in the `with`."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
