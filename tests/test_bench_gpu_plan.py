"""What `python -m bench.gpu` would measure, without a GPU: the work counted, the cases, what of them fits the time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import gpu_worker
from bench.forms import Size
from bench.gpu_plan import COMPILED, LOSSES, MAIN, Case, Work, floor_ms, is_ours, plan, work

from .clock import Clock

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
