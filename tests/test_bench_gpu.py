"""What of `python -m bench.gpu` can be tested without a GPU: counts, rounds, budgets, restarts, pages, messages."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_forms, gpu_parts, gpu_report, gpu_timing, gpu_worker
from bench.forms import Size, tensors
from bench.gpu_plan import COMPILED, LOSSES, MAIN, Case, Work, floor_ms, is_ours, plan, work
from bench.gpu_run import Bench, events_of
from bench.gpu_timing import HostTimer, Sample, interleave, quartiles


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], Sample]:
        def measure() -> Sample:
            self.now += seconds
            return Sample(1e3 * seconds, False)

        return measure


def no_failure(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


# The counts


def test_work_of_a_forward_is_counted_by_hand() -> None:
    B, K, d, m = 3, 5, 7, 2
    (forward,) = work("cuda", Size(B, K, d, m), "forward", 2) or []
    thin = 2 * B * d * m + 2 * K * d * m + 2 * B * d + 2 * K * d  # f·δ, w·δ, the norms of f and w
    assert forward.flops == 2 * B * K * d + thin
    assert forward.bytes == 2 * (B * d + K * d + m * d) + 4 * B * K + B * K
    assert (work("linear", Size(B, K, d, m), "forward", 2) or [])[0] == Work(
        2 * B * K * d, 2 * d * (B + K) + 2 * B * K
    )


def test_work_of_a_step_has_three_phases_and_three_products() -> None:
    for form in ("linear", "cuda", "direct", "triton, m=0"):
        phases = work(form, Size(256, 8142, 2048), "step", 2)
        assert phases is not None
        assert len(phases) == 3
        product = 2 * 256 * 8142 * 2048
        assert 3 * product <= sum(phase.flops for phase in phases) < 3.1 * product
    assert work("Liger", MAIN, "step", 2) is None


def test_a_loss_of_ours_has_three_products_and_no_logits() -> None:
    for form in ("cuda loss", "triton loss, m=0"):
        phases = work(form, Size(256, 8142, 2048), "step", 2)
        assert phases is not None
        product = 2 * 256 * 8142 * 2048
        assert 3 * product <= sum(phase.flops for phase in phases) < 3.1 * product
        assert sum(phase.bytes for phase in phases) < 3 * 2 * 2048 * (256 + 8142 + 5)


def test_fewer_displacements_are_less_work() -> None:
    (with_them,) = work("cuda", MAIN, "forward", 2) or []
    (without,) = work("cuda, m=0", MAIN, "forward", 2) or []
    assert without.flops < with_them.flops
    assert without.bytes == with_them.bytes - 2 * MAIN.m * MAIN.d


def test_the_roofline_is_the_larger_term_of_each_phase() -> None:
    assert floor_ms([Work(2_000, 10)], 1e3, 1e2) == pytest.approx(2e3)
    assert floor_ms([Work(2_000, 1_000)], 1e3, 1e2) == pytest.approx(10e3)
    assert floor_ms([Work(2_000, 10), Work(0, 100)], 1e3, 1e2) == pytest.approx(3e3)


# The cases


def test_the_plan_holds_every_size_once_before_the_visit_for_compiled_forms() -> None:
    cases = [case for case in plan() if not case.graph and case.precision != "tf32"]
    wanted = {
        (precision, Size(B, K, d), kind)
        for precision in ("bf16", "float32")
        for K in (1000, 8142, 100_000, 1_000_000)
        for d in (512, 2048)
        for B in (128, 256, 1024)
        for kind in ("forward", "step")
    }
    with_direct = [(c.precision, c.size, c.kind) for c in cases if "direct" in c.forms]
    assert len(with_direct) == len(set(with_direct))
    assert set(with_direct) == wanted
    assert {(c.precision, c.size, c.kind) for c in cases if set(COMPILED) <= set(c.forms)} == wanted
    assert all(case.forms[0] == "linear" for case in cases)


def test_the_most_important_case_is_first_and_the_list_fits_its_time() -> None:
    first, second, *_ = cases = plan()
    assert (first.precision, first.size, first.kind) == ("bf16", MAIN, "forward")
    assert (second.precision, second.size, second.kind) == ("bf16", MAIN, "step")
    last = max(n for n, case in enumerate(cases) if "direct" in case.forms)
    libraries = [form for form in LOSSES if not is_ours(form)]  # rarely installed
    seconds = [case.without(libraries).estimate(4.0) for case in cases]
    assert sum(seconds[:4]) < 60
    halves = max(n for n, case in enumerate(cases[: last + 1]) if case.precision == "bf16")
    assert sum(seconds[: halves + 1]) < 200
    assert sum(seconds[: last + 1]) < 400


def test_a_case_survives_json() -> None:
    for case in plan():
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_a_case_that_does_not_fit_loses_the_compiled_forms_and_then_itself() -> None:
    case = plan()[0]
    whole, lean = case.estimate(10.0), case.without(COMPILED).estimate(10.0)
    assert gpu_worker.fitted(case, whole, 10.0) == (case, "")
    chosen, why = gpu_worker.fitted(case, whole - 0.1, 10.0)
    assert chosen == case.without(COMPILED)
    assert "torch.compile" in why
    chosen, why = gpu_worker.fitted(case, lean - 0.1, 10.0)
    assert chosen is None
    assert "of the budget were left" in why


def test_cases_beyond_the_deadline_are_skipped_with_the_reason() -> None:
    events: list[dict[str, Any]] = []
    worker = gpu_worker.Worker("cpu", events.append, {}, 0.0)
    clock = Clock()

    def run(case: Case) -> dict[str, Any]:
        clock.now += 30
        return {"case": case.to_json(), "forms": {}}

    worker.run = run  # type: ignore[method-assign]
    gpu_worker.work_through(worker, list(enumerate(plan()[:4])), deadline=61.0, clock=clock)
    assert [e["event"] for e in events] == ["begin", "case", "begin", "case", "skipped", "skipped"]
    assert all("s of the budget were left" in e["reason"] for e in events[-2:])


# The rounds


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


# The budget and the parts


def test_parts_share_the_time_and_pass_on_what_they_leave() -> None:
    clock = Clock()
    budget = gpu.Budget(8, ["build", "test", "sanitize", "bench"], clock)
    assert budget.seconds("build") < 0.35 * 480
    clock.now = 60.0
    test = budget.seconds("test")
    clock.now += test
    clock.now += budget.seconds("sanitize")
    assert budget.seconds("bench") == pytest.approx(480 - clock.now)
    assert budget.seconds("bench") > 160
    assert gpu.Budget(1, ["bench"], Clock()).seconds("bench") == 60


def test_pytests_last_line_is_counted() -> None:
    assert gpu_parts._counts("x\n=== 3 failed, 10 passed, 2 errors in 2.31s ===\n") == {
        "failed": 3,
        "passed": 10,
        "error": 2,
    }
    assert gpu_parts._counts("Traceback") == {}


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", None),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 2 errors", "ERROR SUMMARY: 2 errors"),
        (1, "Device not supported", "ended with 1 and no summary"),
        (None, "", "stopped after 7 s"),
    ],
)
def test_the_sanitizers_summary_is_read(code: int | None, output: str, problem: str | None) -> None:
    run = gpu_parts._sanitized(gpu_parts.Done(code, output, 1.0), 7.0)
    assert run.get("problem") == problem


def test_without_the_sanitizer_the_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "find_sanitizer", lambda: None)
    assert "compute-sanitizer was found neither" in gpu_parts.sanitize(9.0, ["cuda"])["not run"]


def test_a_command_ends_in_its_time() -> None:
    begin = time.monotonic()
    done = gpu_parts.command(
        [sys.executable, "-c", "import time; print('a', flush=True); time.sleep(60)"], 1.5
    )
    assert done.code is None
    assert done.output.startswith("a")
    assert time.monotonic() - begin < 30


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


# The page


def found(ms: float, ratio: float, **more: Any) -> dict[str, Any]:
    quarters = {"q1": ms, "median": ms, "q3": ms}
    return {
        "ms": quarters,
        "n": 9,
        "ratio": {"q1": ratio, "median": ratio, "q3": ratio, "n": 9},
        "behind": 0.0,
        **more,
    }


def document(**forms: Any) -> dict[str, Any]:
    case = Case("bf16", MAIN, "forward", tuple(forms), 1.0)
    return {
        "header": {"gpu": "NVIDIA Something", "driver": None, "torch": "2.11.0"},
        "parts": {
            "build": {},
            "test": {"problem": "3 failed", "runs": {"operators": {"counts": {"failed": 3}}}},
        },
        "cases": [{"case": case.to_json(), "forms": forms, "seconds": 1.0}],
        "skipped": [{"case": plan()[9].to_json(), "reason": "the time was up"}],
    }


def verdict(written: dict[str, Any], text: str, backend: str = "cuda") -> gpu_report.Verdict:
    (one,) = [v for v in gpu_report.verdicts(written) if v.backend == backend and text in v.target]
    return one


LINEAR = found(1.0, 1.0, memory=100)


def test_targets_are_met_missed_or_not_measured() -> None:
    written = document(
        linear=LINEAR,
        cuda=found(1.2, 1.2, roofline=0.71, memory=139),
        direct=found(30.0, 30.0),
        triton={"failed": "it crashed"},
    )
    assert verdict(written, "forward ≤ 1.15")[2:4] == ("missed", "1.20 ×")
    assert verdict(written, "roofline")[2:4] == ("met", "71%")
    assert verdict(written, "forward ≥ 15")[2:4] == ("met", "25.00 ×")
    assert verdict(written, "forward memory")[2:4] == ("met", "1.39 ×")
    assert verdict(written, "forward ≥ 1.3")[2:4] == ("not measured", "split compiled was not measured")
    assert verdict(written, "step ≤ 1.10")[2] == "not measured"
    assert verdict(written, "forward ≤ 1.15", "triton")[2:4] == ("not measured", "triton: it crashed")


def test_a_wrong_result_meets_no_target() -> None:
    written = document(linear=LINEAR, cuda=found(0.1, 0.1, inexact="logits: 9.0e-01"))
    assert verdict(written, "forward ≤ 1.15").verdict == "not measured"
    assert "wrong" in verdict(written, "forward ≤ 1.15").detail


def test_the_page_has_header_tables_and_reasons() -> None:
    written = document(
        linear=LINEAR, cuda=found(1.2, 1.2, roofline=0.71, memory=3 << 20), CCE={"skipped": "a|b"}
    )
    page = gpu_report.render(written)
    assert "- torch: 2.11.0" in page
    assert "driver" not in page  # it was not readable
    assert "test: **3 failed**" in page
    assert "| | 256×8142×2048 |" in page
    assert "| gistops, cuda | 1.20 (1.2 ms; 9; 71%; 3 MiB) |" in page
    assert "| CCE |" not in page.split("## Not measured")[0]
    assert r"CCE: a\|b" in page
    assert "the time was up (" in page
    widths = [
        [line.count(" |") for line in block.splitlines()] for block in page.split("\n\n") if block[0] == "|"
    ]
    assert all(len({w for w in lines if w}) == 1 for lines in widths)


def test_results_are_moved_into_place(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    for ratio in (1.2, 1.3):
        gpu_report.write(path, document(linear=LINEAR, cuda=found(1.2, ratio)))
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["cases"][0]["forms"]["cuda"]["ratio"]["median"] == 1.3
    assert read["verdicts"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu.json", "gpu.md"]


# The command


def test_without_a_gpu_it_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "build,dance"], "expected some of build, test, sanitize, bench, got 'dance'"),
        (["--minutes", "-1"], "expected a positive number of minutes, got '-1'"),
        (["--minutes", "nan"], "expected a positive number of minutes, got 'nan'"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_output_is_named_after_gpu_and_day() -> None:
    path = gpu.default_output("NVIDIA H100 80GB HBM3")
    assert path.parent.parts[-2:] == ("bench", "results")
    assert path.name.startswith("nvidia-h100-80gb-hbm3-2")
    assert path.suffix == ".json"
    assert gpu.parts("bench,build") == ["build", "bench"]


def test_problems_end_in_a_status_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "run_tests", lambda seconds: {"problem": "3 failed"})
    argv = ["--device", "cpu", "--only", "test", "--output", str(tmp_path / "x.json")]
    assert gpu.main(argv) == 1
    assert "PROBLEM, test: 3 failed" in capsys.readouterr().err
    monkeypatch.setattr(gpu_parts, "run_tests", lambda seconds: {})
    assert gpu.main(argv) == 0
