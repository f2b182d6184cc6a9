"""Tests of the measurements of `python -m bench.gpu` without a GPU: rounds, accuracy checks, crashes and restarts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import baselines
from bench.gpu import accuracy, calls, device_constants, smoke_checks, variants, worker, worker_pool
from bench.gpu.plan import Case
from bench.gpu.supervisor import Supervisor, read_events
from bench.gpu.timing import HostTimer, Sample, interleave, quartiles
from bench.problem import Size, make_tensors

from .clock import Clock

# The rounds


def no_failure(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


def test_each_variant_is_timed_once_per_round_in_rotating_order() -> None:
    clock, order = Clock(), []

    def measure(name: str) -> Callable[[], Sample]:
        def run() -> Sample:
            order.append(name)
            return clock.takes(0.01)()

        return run

    samples = interleave({n: measure(n) for n in "abc"}, 0.18, no_failure, clock=clock, minimum=1)
    assert order[:9] == list("abc" + "bca" + "cab")
    assert {len(rounds) for rounds in samples.values()} == {6}


def test_slow_variants_rest_and_the_baseline_does_not() -> None:
    clock = Clock()
    measures = {"linear": clock.takes(0.002), "fast": clock.takes(0.001), "slow": clock.takes(0.5)}
    samples = interleave(measures, 3.0, no_failure, limit="linear", clock=clock, minimum=5, maximum=50)
    assert len(samples["slow"]) == 5
    assert len(samples["fast"]) == len(samples["linear"]) == 50


def test_the_minimum_of_rounds_is_kept_beyond_the_time() -> None:
    clock = Clock()
    samples = interleave({"a": clock.takes(2.0)}, 1.0, no_failure, clock=clock, minimum=5)
    assert len(samples["a"]) == 5


def test_a_failed_variant_leaves_the_rounds() -> None:
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
    known = {
        name: device_constants.DeviceConstants(HostTimer(), "cpu").measure(name)
        for name in ("copy", "mm float32")
    }
    mine = worker.Worker("cpu", events.append, known)
    for kind in variants.KINDS:
        case = Case("float32", Size(5, 33, 17), kind, ("linear", "cpu", "cuda"), 0.02)
        able, reasons = mine.available(case)
        assert list(reasons) == ["cuda"]  # it serves no tensors on a CPU
        found = mine.run(able)["variants"]
        assert found["linear"]["ratio"]["median"] == 1.0
        assert found["linear"]["n"] >= 5
        assert found["cpu"]["roofline"] > 0
        assert max(found["cpu"]["error"].values()) < 1e-4
        assert "inexact" not in found["cpu"]
    assert {"event": "variant", "variant": "cpu", "patience": None} in events


def test_every_constant_is_measured_or_says_why_not() -> None:
    mine = device_constants.DeviceConstants(HostTimer(), "cpu")
    found = {name: mine.measure(name) for name in device_constants.CONSTANTS}
    assert all("value" in one or one["skipped"] == "needs a GPU" for one in found.values())
    assert set(device_constants.roofline_ceilings(found)) == {
        "bandwidth",
        "events_ms",
        "bf16",
        "tf32",
        "float32",
    }
    assert len(list(device_constants.summary(found))) == len(found)


def test_kernels_of_a_variant_are_profiled() -> None:
    mine = worker.Worker("cpu", lambda event: None, {})
    found = mine.run(Case("bf16", Size(4, 9, 8), "profile", ("cpu",)))["variants"]["cpu"]["kernels"]
    assert set(found) == set(variants.KINDS)
    assert all(row["us"] > 0 for row in found["step"])


# Accuracy


def test_wrong_results_are_detected() -> None:
    arguments = make_tensors(Size(6, 40, 24))
    right = calls.make_call("direct", "forward", arguments, "float32")()
    assert accuracy.logits_error(right, arguments) < 1e-5
    assert (
        "logits"
        in accuracy.check_call("direct", "forward", "float32", right * 1.01, arguments, None)["inexact"]
    )
    assert (
        "logits"
        in accuracy.check_call("direct", "forward", "float32", right * torch.nan, arguments, None)["inexact"]
    )
    gradients = accuracy.reference_gradients(arguments)
    assert gradients is not None
    assert accuracy.gradients_error(arguments, gradients) == float("inf")  # no gradient exists yet
    calls.make_call("direct", "step", arguments, "float32")()
    assert accuracy.gradients_error(arguments, gradients) < 1e-4


@pytest.mark.parametrize("size", [Size(30, 20, 17), Size(1, 20, 8), Size(9, 7, 8, 0), Size(30, 20, 16, 12)])
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_smoke_checks_accept_right_results(precision: str, size: Size) -> None:
    arguments = make_tensors(size, worker.DTYPES[precision], "cpu", smoke_checks.SEED)
    oracle = smoke_checks.Oracle(arguments, cosine=False)
    found = smoke_checks.run_smoke_check("cpu", precision, arguments, oracle, "cpu")
    assert set(found) == set(variants.KINDS)
    assert not any(smoke_checks.objection(kind) for kind in found.values()), found


@pytest.mark.parametrize("name", ["cpu, rotation", "cpu, subcenters"])
def test_smoke_checks_accept_right_losses_of_other_vectors(name: str) -> None:
    for size in (Size(30, 20, 17), Size(9, 7, 8, 0)):
        arguments = make_tensors(size, torch.float32, "cpu", smoke_checks.SEED)
        variant = variants.TABLE[name]
        oracle = smoke_checks.Oracle(arguments, variant.cosine, variant.vectors)
        found = smoke_checks.run_smoke_check(name, "float32", arguments, oracle, "cpu")
        assert set(found) == {"loss"}
        assert not smoke_checks.objection(found["loss"]), found


def test_smoke_checks_find_unwritten_and_unstable_results(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_tensors(Size(5, 7, 8), torch.float32, "cpu", smoke_checks.SEED)
    oracle = smoke_checks.Oracle(arguments, cosine=False)

    def unwritten(*arguments: Any, **options: Any) -> torch.Tensor:
        out = torch.empty(5, 7)  # the last class is never written
        out[:, :6] = baselines.direct(*arguments)[:, :6]
        return out

    monkeypatch.setattr("gistops.constellation_logits", unwritten)
    found = smoke_checks.run_smoke_check("cpu", "float32", arguments, oracle, "cpu")
    assert "logits: nan" in smoke_checks.objection(found["forward"])
    assert not smoke_checks.objection(found["loss"])
    turns = iter(range(100))

    def unstable(*arguments: Any, **options: Any) -> torch.Tensor:
        return baselines.direct(*arguments) * (1 + 1e-6 * next(turns))

    monkeypatch.setattr("gistops.constellation_logits", unstable)
    found = smoke_checks.run_smoke_check("cpu", "float32", arguments, oracle, "cpu")
    assert smoke_checks.objection(found["forward"]) == "a second run gave other bits"


def test_smoke_failures_exclude_by_precision_and_kind() -> None:
    case = Case("bf16", Size(5, 7, 8), "smoke", ("cuda", "triton", "cpu")).to_json()
    found = {
        "cuda": {"forward": {}, "step": {"inexact": "gradients: nan"}, "loss": {}},
        "triton": {"failed": "illegal address"},
        "cpu": {"skipped": "it is not there"},
    }
    results = [{"case": case, "variants": found}]
    out = worker_pool.wrong_variants(results)
    assert out["bf16 step"] == {"cuda": "5×7×8: gradients: nan", "triton": "5×7×8: illegal address"}
    assert out["bf16 forward"] == {"triton": "5×7×8: illegal address"}
    assert worker_pool.absent_variants(results) == {"cpu": "it is not there"}
    assert worker_pool.split_variants(list("abcde"), 2) == [["a", "c", "e"], ["b", "d"]]


# The worker's crashes


def fake_worker(body: str) -> tuple[str, ...]:
    """Return the command of a process that writes events as bench/gpu/worker.py does."""
    head = """
        import json, os, sys
        asked = json.load(sys.stdin)
        def emit(**event): print(json.dumps(event), flush=True)
        def case(number, values):
            emit(event="begin", number=number)
            for variant in values["variants"]:
                emit(event="variant", variant=variant)
                BODY
            variants = {variant: {} for variant in values["variants"]}
            emit(event="case", number=number, seconds=0.1, result={"case": values, "variants": variants})
        for number, values in asked["cases"]: case(number, values)
        emit(event="done")
    """
    return (sys.executable, "-c", textwrap.dedent(head).replace("BODY", body))


CASES = [Case("bf16", Size(1, 2, k), "forward", ("linear", "cuda", "direct"), 0.1) for k in (1, 2, 3)]


def test_a_crash_excludes_the_variant_alone() -> None:
    written = []
    bench = Supervisor(
        CASES,
        time.time() + 600,
        lambda: written.append(1),
        worker=fake_worker("if variant == 'cuda': os._exit(7)"),
    )
    bench.run()
    assert [result["case"]["size"]["d"] for result in bench.results] == [1, 2, 3]
    assert all({"linear", "direct"} <= set(result["variants"]) for result in bench.results)
    assert "ended with 7" in bench.results[0]["variants"]["cuda"]["failed"]
    assert bench.results[2]["variants"]["cuda"]["failed"] == "excluded after it crashed twice"
    assert len(bench.problems) == 2
    assert len(written) >= 3


def test_a_lost_device_is_attributed_to_the_running_variant() -> None:
    body = "if variant == 'cuda' and number == 1: emit(event='lost', reason='illegal address'); os._exit(1)"
    bench = Supervisor(CASES, time.time() + 600, lambda: None, worker=fake_worker(body))
    bench.run()
    assert len(bench.results) == 3
    assert bench.results[1]["variants"]["cuda"] == {"failed": "illegal address"}
    assert bench.results[2]["variants"]["cuda"] == {}


def test_a_worker_that_does_not_start_ends_the_session() -> None:
    bench = Supervisor(
        CASES, time.time() + 600, lambda: None, worker=(sys.executable, "-c", "raise SystemExit('no')")
    )
    bench.run()
    assert len(bench.skipped) == 3
    assert "before its first case" in bench.problems[0]


def test_a_hang_excludes_the_variant_alone() -> None:
    hangs = fake_worker("if variant == 'cuda': import time; time.sleep(1000)")
    bench = Supervisor(CASES[:2], time.time() + 600, lambda: None, worker=hangs, silence=2.0)
    bench.run()
    assert bench.results[0]["variants"]["cuda"]["failed"] == "it hung for 2 s"
    assert len(bench.results) == 2


def test_the_worker_itself_measures_on_a_cpu() -> None:
    cases = [
        Case("bf16", Size(4, 9, 8), "constants", ("empty",)),
        Case("float32", Size(4, 9, 8), "forward", ("linear", "cuda", "direct"), 0.01),
        Case("float32", Size(4, 9, 8), "profile", ("cpu",)),
    ]
    bench = Supervisor(cases, time.time() + 600, lambda: None, "cpu", {"profile": 0.0})
    bench.run()
    assert bench.problems == []
    assert bench.results[0]["variants"]["empty"]["value"] > 0
    found = bench.results[1]["variants"]
    assert found["direct"]["n"] >= 5
    assert "skipped" in found["cuda"]
    assert [skipped["case"]["kind"] for skipped in bench.skipped] == ["profile"]  # its deadline had passed


def test_silence_ends_the_wait() -> None:
    code = "import time; print('{}', flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    limits = iter([300.0, 0.5])
    events = read_events(process.stdout, time.time() + 600, silence=lambda: next(limits))
    try:
        assert next(events) == {}
        with pytest.raises(TimeoutError, match="hung"):
            next(events)
    finally:
        process.kill()
        process.wait()
