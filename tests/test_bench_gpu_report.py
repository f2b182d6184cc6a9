"""The page that `python -m bench.gpu` writes: targets, tables, reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import gpu_report
from bench.gpu_plan import MAIN, Case, plan


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
