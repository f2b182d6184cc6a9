"""How `python -m bench.gpu` measures, without a GPU: rounds, right results told from wrong ones, crashes and restarts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import gpu_forms, gpu_timing, gpu_worker
from bench.forms import Size, tensors
from bench.gpu_plan import Case
from bench.gpu_run import Bench, events_of
from bench.gpu_timing import HostTimer, Sample, interleave, quartiles

from .clock import Clock

# The rounds


def no_failure(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


def test_each_form_is_timed_once_a_round_and_the_order_turns() -> None:
    clock, order = Clock(), []

    def measure(name: str) -> Callable[[], Sample]:
        def run() -> Sample:
            order.append(name)
            return clock.takes(0.01)()

        return run

    samples = interleave({n: measure(n) for n in "abc"}, 0.18, no_failure, clock=clock, minimum=1)
    assert order[:9] == list("abc" + "bca" + "cab")
    assert {len(rounds) for rounds in samples.values()} == {6}


def test_slow_forms_rest_and_the_limit_never_does() -> None:
    clock = Clock()
    measures = {"linear": clock.takes(0.002), "fast": clock.takes(0.001), "slow": clock.takes(0.5)}
    samples = interleave(measures, 3.0, no_failure, limit="linear", clock=clock, minimum=5, maximum=50)
    assert len(samples["slow"]) == 5
    assert len(samples["fast"]) == len(samples["linear"]) == 50


def test_the_minimum_of_rounds_is_kept_beyond_the_time() -> None:
    clock = Clock()
    samples = interleave({"a": clock.takes(2.0)}, 1.0, no_failure, clock=clock, minimum=5)
    assert len(samples["a"]) == 5


def test_a_form_that_fails_leaves_the_rounds() -> None:
    clock, failures = Clock(), {}

    def broken() -> Sample:
        raise RuntimeError("no such kernel")

    measures = {"linear": clock.takes(0.01), "broken": broken}
    samples = interleave(measures, 0.1, lambda n, e: failures.update({n: str(e)}), clock=clock)
    assert failures == {"broken": "no such kernel"}
    assert "broken" not in samples


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def test_a_case_is_measured_on_the_cpu_with_ratios_of_pairs() -> None:
    events: list[dict[str, Any]] = []
    ceilings = gpu_timing.ceilings(HostTimer(), "cpu", side=64, copied=1 << 16)
    worker = gpu_worker.Worker("cpu", events.append, ceilings, 0.0)
    for kind in ("forward", "step"):
        case = Case("float32", Size(5, 33, 17), kind, ("linear", "reference", "direct", "cuda"), 0.02)
        able, reasons = worker.able(case)
        assert list(reasons) == ["cuda"]  # it serves no tensors on a CPU
        forms = worker.run(able)["forms"]
        assert forms["linear"]["ratio"]["median"] == 1.0
        assert forms["linear"]["n"] >= 5
        assert forms["direct"]["roofline"] > 0
        assert max(forms["direct"]["error"].values()) < 1e-4
        assert "inexact" not in forms["direct"]
    assert {"event": "form", "form": "direct"} in events


def test_wrong_results_are_told_from_right_ones() -> None:
    arguments = tensors(Size(6, 40, 24))
    right = gpu_forms.make("direct")
    assert gpu_forms.logits_error(right, arguments) < 1e-5
    assert gpu_forms.logits_error(lambda *a: right(*a) * 1.01, arguments) > 1e-3
    assert not gpu_forms.logits_error(lambda *a: right(*a) * torch.nan, arguments) <= 1e30
    gradients = gpu_forms.reference_gradients(arguments)
    assert gradients is not None
    assert gpu_forms.gradients_error(arguments, gradients) == float("inf")  # none has been made
    run, _ = gpu_forms.runner("direct", "step", arguments)
    run()
    assert gpu_forms.gradients_error(arguments, gradients) < 1e-4


# The worker's crashes


def fake_worker(body: str) -> tuple[str, ...]:
    """A process that speaks as bench/gpu_worker.py does."""
    head = """
        import json, os, sys
        asked = json.load(sys.stdin)
        def emit(**event): print(json.dumps(event), flush=True)
        def case(number, values):
            emit(event="begin", number=number)
            for form in values["forms"]:
                emit(event="form", form=form)
                BODY
            forms = {form: {} for form in values["forms"]}
            emit(event="case", number=number, seconds=0.1, result={"case": values, "forms": forms})
        for number, values in asked["cases"]: case(number, values)
        emit(event="done", compile_seconds=1)
    """
    return (sys.executable, "-c", textwrap.dedent(head).replace("BODY", body))


CASES = [Case("bf16", Size(1, 2, k), "forward", ("linear", "cuda", "direct"), 0.1) for k in (1, 2, 3)]


def test_a_crash_costs_the_form_and_not_the_run() -> None:
    written = []
    bench = Bench(
        CASES,
        time.time() + 60,
        lambda: written.append(1),
        worker=fake_worker("if form == 'cuda': os._exit(7)"),
    )
    bench.run()
    assert [result["case"]["size"]["d"] for result in bench.results] == [1, 2, 3]
    assert all({"linear", "direct"} <= set(result["forms"]) for result in bench.results)
    assert "ended with 7" in bench.results[0]["forms"]["cuda"]["failed"]
    assert bench.results[2]["forms"]["cuda"]["failed"] == "left out after it crashed twice"
    assert len(bench.problems) == 2
    assert len(written) >= 3


def test_a_lost_device_is_blamed_on_the_form_that_was_run() -> None:
    body = "if form == 'cuda' and number == 1: emit(event='lost', reason='illegal address'); os._exit(1)"
    bench = Bench(CASES, time.time() + 60, lambda: None, worker=fake_worker(body))
    bench.run()
    assert len(bench.results) == 3
    assert bench.results[1]["forms"]["cuda"] == {"failed": "illegal address"}
    assert bench.results[2]["forms"]["cuda"] == {}


def test_a_worker_that_does_not_start_is_no_endless_loop() -> None:
    bench = Bench(
        CASES, time.time() + 60, lambda: None, worker=(sys.executable, "-c", "raise SystemExit('no')")
    )
    bench.run()
    assert len(bench.skipped) == 3
    assert "before its first case" in bench.problems[0]


def test_the_worker_itself_measures_on_a_cpu() -> None:
    cases = [Case("float32", Size(4, 9, 8), "forward", ("linear", "cuda", "direct"), 0.01)]
    bench = Bench(cases, time.time() + 120, lambda: None, "cpu")
    bench.run()
    assert bench.problems == []
    assert bench.ceilings["bandwidth"] > 0
    forms = bench.results[0]["forms"]
    assert forms["direct"]["n"] >= 5
    assert "skipped" in forms["cuda"]


def test_silence_ends_the_wait() -> None:
    code = "import time; print('{}', flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    events = events_of(process.stdout, time.time() + 60, silence=0.5)
    try:
        assert next(events) == {}
        with pytest.raises(TimeoutError, match="hung"):
            next(events)
    finally:
        process.kill()
        process.wait()
