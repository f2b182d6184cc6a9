"""Tests of the roofline, the cases, the variants and the settings of `python -m bench.gpu`."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from bench.gpu import plan, settings, variants, worker
from bench.gpu.plan import SIZES, Case, Filter
from bench.gpu.roofline import Work, floor_ms, work
from bench.gpu.variants import KINDS, TABLE
from bench.problem import MAIN, Size

from .clock import Clock

# The counts


def test_work_of_a_forward_is_counted_by_hand() -> None:
    B, K, d, m = 3, 5, 7, 2
    (forward,) = work("cuda", Size(B, K, d, m), "forward", 2) or []
    thin = 2 * B * d * m + 2 * K * d * m + 2 * B * d + 2 * K * d  # f·δ, w·δ, the norms of f and w
    assert forward.flops == 2 * B * K * d + thin
    assert forward.bytes == 2 * (B * d + K * d + m * d) + 4 * B * K  # no slots without gradients
    assert (work("linear", Size(B, K, d, m), "forward", 2) or [])[0] == Work(
        2 * B * K * d, 2 * d * (B + K) + 2 * B * K
    )


def test_work_of_a_step_has_three_phases_and_three_matmuls() -> None:
    for variant in ("linear", "cuda", "direct", "triton, m=0"):
        phases = work(variant, Size(256, 8142, 2048), "step", 2)
        assert phases is not None
        assert len(phases) == 3
        product = 2 * 256 * 8142 * 2048
        assert 3 * product <= sum(phase.flops for phase in phases) < 3.1 * product
    assert work("Liger", MAIN, "loss", 2) is None


def test_a_fused_loss_has_three_matmuls_and_no_logits() -> None:
    for variant in ("cuda", "triton, m=0"):
        phases = work(variant, Size(256, 8142, 2048), "loss", 2)
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

EVERY = list(TABLE)
CASES = plan.timed_cases(EVERY)


def test_every_size_precision_and_kind_is_measured_the_most_important_first() -> None:
    plain = [(c.precision, c.size, c.kind) for c in CASES if not c.graph and not c.compiles]
    assert len(plain) == len(set(plain)) == 3 * 4 * 4
    assert set(plain) == {(p, s, k) for p in variants.PRECISIONS for s in SIZES for k in KINDS}
    assert plain[:3] == [("bf16", MAIN, kind) for kind in ("forward", "step", "loss")]
    assert {c.variants for c in CASES if c.kind == "topk" and not c.graph} == {
        ("linear", "cuda", "triton", "cpu")
    }
    assert all(case.variants[0] == "linear" for case in CASES)
    assert max(n for n, c in enumerate(CASES) if not c.compiles) < min(
        n for n, c in enumerate(CASES) if c.compiles
    )
    assert {c.size for c in CASES if c.compiles} == set(SIZES[:2])
    grid = plan.timed_cases(EVERY, grid=True)
    assert grid[: len(CASES)] == CASES
    assert Size(1024, 1_000_000, 2048) in {case.size for case in grid}


def test_the_cases_fit_their_time() -> None:
    libraries = [n for n in EVERY if TABLE[n].family == "peer"]  # rarely installed
    seconds = [case.without(libraries).estimate() for case in plan.timed_cases(EVERY, 0.8)]
    assert sum(seconds[:9]) < 25
    assert sum(s for s, c in zip(seconds, CASES, strict=True) if not c.compiles) < 125


def test_a_case_survives_json() -> None:
    for case in CASES:
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_cases_are_picked_by_precision_size_and_kind() -> None:
    asked = Filter("bf16:256x8142x2048:loss,tf32")
    found = [c for c in CASES if asked(c)]
    assert {c.precision for c in found} == {"bf16", "tf32"}
    assert {(c.size, c.kind) for c in found if c.precision == "bf16"} == {(MAIN, "loss")}
    own = Filter("float32:64x500x128").extra_cases(EVERY, 0.1)
    assert [(c.precision, c.size, c.kind) for c in own] == [("float32", Size(64, 500, 128), k) for k in KINDS]
    assert Filter("bf16").extra_cases(EVERY, 0.1) == []


def test_variants_are_picked_by_patterns() -> None:
    assert variants.chosen(["triton F*"])[0] == "linear"
    assert all(name.startswith("triton F") for name in variants.chosen(["triton F*"])[1:])
    assert len(TABLE) == len(variants.VARIANTS)
    with pytest.raises(ValueError, match="no variant is named 'nothing'"):
        variants.chosen(["nothing"])


def test_a_variant_without_its_setting_is_absent_with_a_reason() -> None:
    assert settings.why_not({"slow": 1}) == "no setting is named 'slow'"
    gone = settings._attribute("backends.chunked.scorers", "NO_SUCH_THING")
    assert gone.why_not(1) == "gistops.backends.chunked.scorers has no NO_SUCH_THING"
    assert "serves no tensors" in str(variants.why_not("cpu", "cuda"))


def test_settings_apply_inside_the_with_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gistops.backends.chunked import scorers

    before = scorers.CHUNK_ELEMENTS
    with settings.applied({"chunk": 77}, "bf16"):
        assert scorers.CHUNK_ELEMENTS == 77
    assert before == scorers.CHUNK_ELEMENTS
    name = "GISTOPS_CUDA_CENTERS_TILE"
    monkeypatch.setenv(name, "128")
    with settings.applied({"cuda centers tile": 0}, "bf16"):
        assert os.environ[name] == "0"
    assert os.environ[name] == "128"
    monkeypatch.delenv(name)
    with settings.applied({"cuda centers tile": 64}, "bf16"):
        assert os.environ[name] == "64"
    assert name not in os.environ


def test_smoke_checks_have_every_kind_of_size() -> None:
    cases = plan.smoke_cases(EVERY, CASES)
    sizes = {case.size for case in cases}
    assert {1} < {s.B for s in sizes}
    assert {0, 4, 12} == {s.m for s in sizes}
    assert any(s.d % 8 for s in sizes)
    assert {case.precision for case in cases} == set(variants.PRECISIONS)
    assert all(TABLE[n].ours for case in cases for n in case.variants)


def test_cases_beyond_the_deadline_are_skipped_with_a_reason() -> None:
    events: list[dict[str, Any]] = []
    fake = worker.Worker("cpu", events.append, {})
    clock = Clock()

    def run(case: Case) -> dict[str, Any]:
        clock.now += 30
        return {"case": case.to_json(), "variants": {}}

    fake.run = run  # type: ignore[method-assign]
    worker.work_through(fake, list(enumerate(CASES[:4])), deadline=lambda case: 60.0, clock=clock)
    assert [e["event"] for e in events] == [
        "begin",
        "case",
        "begin",
        "case",
        "begin",
        "skipped",
        "begin",
        "skipped",
    ]
    assert all("s of the budget were left" in e["reason"] for e in events if e["event"] == "skipped")
