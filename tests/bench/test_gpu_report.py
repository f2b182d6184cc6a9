"""Tests of the targets, the selection rule, the page and the files of `python -m bench.gpu`."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from bench.gpu import output, report, selection_rule, table_entries, targets, torch_profiler
from bench.gpu.plan import SIZES, Case, timed_cases
from bench.gpu.variants import TABLE
from bench.problem import MAIN
from gistops.backends.triton import tile_tables


def found(ms: float, ratio: float, **more: Any) -> dict[str, Any]:
    quarters = {"q1": ms, "median": ms, "q3": ms}
    ratios = {"q1": ratio, "median": ratio, "q3": ratio, "n": 9}
    return {"ms": quarters, "n": 9, "ratio": ratios, "behind": 0.0, **more}


def result(case: Case, **variants: Any) -> dict[str, Any]:
    return {"case": case.to_json(), "variants": variants, "seconds": 1.0}


def document(**variants: Any) -> dict[str, Any]:
    return {
        "header": {"gpu": "NVIDIA Something", "driver": None, "torch": "2.11.0"},
        "parts": {
            "build": {},
            "test": {"problem": "3 failed", "runs": {"operators": {"counts": {"failed": 3}}}},
        },
        "cases": [result(Case("bf16", MAIN, "forward", tuple(variants)), **variants)],
        "skipped": [{"case": timed_cases(list(TABLE))[9].to_json(), "reason": "the time was up"}],
    }


def verdict(written: dict[str, Any], text: str, variant: str = "cuda") -> targets.Verdict:
    (one,) = [v for v in targets.verdicts(written) if v.variant == variant and text in v.target]
    return one


LINEAR = found(1.0, 1.0, memory=100)

# Targets


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


def test_a_compiled_variant_is_compared_across_cases() -> None:
    written = document(linear=LINEAR, cuda=found(1.2, 1.2))
    compiled = {"linear": LINEAR, "split compiled": found(2.4, 2.4)}
    written["cases"].append(result(Case("bf16", MAIN, "forward", tuple(compiled)), **compiled))
    assert verdict(written, "forward ≥ 1.3")[2:4] == ("met", "2.00 ×")


def test_a_wrong_result_meets_no_target() -> None:
    written = document(linear=LINEAR, cuda=found(0.1, 0.1, inexact="logits: 9.0e-01"))
    assert verdict(written, "forward ≤ 1.15").verdict == "not measured"
    assert "wrong" in verdict(written, "forward ≤ 1.15").detail


# The rule


def sizes(kind: str = "forward", **of: list[float]) -> dict[str, Any]:
    """Return a document with the ratios of each variant at the four sizes."""
    cases = []
    for n, size in enumerate(SIZES):
        variants = {name.replace("_", " "): found(r[n], r[n]) for name, r in of.items()}
        cases.append(result(Case("bf16", size, kind, tuple(variants)), **variants))
    return {"header": {"gpu": "x"}, "parts": {}, "cases": cases}


ONES = [1.0] * 4


def test_the_lowest_geometric_mean_wins() -> None:
    pick = selection_rule.choose(
        sizes(linear=ONES, cuda=[1.0, 4.0, 2.0, 2.0], triton=[1.9] * 4), "bf16", "forward"
    )
    assert pick["winner"] == "triton"
    assert abs(pick["means"]["cuda"] - 2.0) < 1e-9
    assert list(pick["but"]) == [str(MAIN)]
    assert pick["but"][str(MAIN)]["variant"] == "cuda"


def test_within_three_percent_the_simpler_one_wins() -> None:
    written = sizes(linear=ONES, cuda=[2.0] * 4, triton=[2.05] * 4)
    assert selection_rule.choose(written, "bf16", "forward")["winner"] == "triton"
    written = sizes(linear=ONES, cuda=[2.0] * 4, triton=[2.07] * 4)
    assert selection_rule.choose(written, "bf16", "forward")["winner"] == "cuda"


def test_wrong_or_incomplete_variants_do_not_win() -> None:
    written = sizes(linear=ONES, cuda=[1.0] * 4, triton=[2.0] * 4)
    written["out"] = {"bf16 forward": {"cuda": "a second run gave other bits"}}
    assert selection_rule.choose(written, "bf16", "forward")["winner"] == "triton"
    written = sizes(linear=ONES, cuda=[1.0] * 4, triton=[2.0] * 4)
    written["parts"]["sanitize"] = {"runs": {"cuda memcheck": {"problem": "ERROR SUMMARY: 2 errors"}}}
    assert selection_rule.choose(written, "bf16", "forward")["winner"] == "triton"
    written = sizes(linear=ONES, cuda=[1.0] * 4, triton=[2.0] * 4)
    del written["cases"][3]["variants"]["cuda"]
    assert selection_rule.choose(written, "bf16", "forward")["winner"] == "triton"
    written["cases"][0]["variants"]["triton"] = {"failed": "illegal address"}
    assert selection_rule.choose(written, "bf16", "forward") == {"none": "none was measured at every size"}


def test_a_hand_written_forward_is_compared_with_aligned_classes() -> None:
    written = sizes(linear=ONES, cuda=[0.023] * 4)
    written["constants"] = {"linear forward K=8192": {"ms": 0.019}}
    assert selection_rule.worth_hand_written(written)["above threshold"] is True
    written["constants"] = {"linear forward K=8192": {"ms": 0.020}}
    assert selection_rule.worth_hand_written(written)["above threshold"] is False


RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_entries_of_the_table_from_a_committed_result() -> None:
    """A variant that won gives its settings; a setting that only losers have keeps the table's value, now measured."""
    written = table_entries.load(RESULTS / "nvidia-h100-80gb-hbm3-2026-11-26.json")
    entries = list(table_entries.lines(written))
    source = "measured: bench/results/nvidia-h100-80gb-hbm3-2026-11-26.json, bf16 loss"
    # The default of today was not yet a default, and has no row any more.
    assert f'("route_loss_grad", "hopper", "half"): Choice((16, 64, 8), "{source}"),' in entries
    assert f'("route_loss_grad_unrolled", "hopper", "half"): Choice(True, "{source}"),' in entries
    assert f'("centers_product", "hopper", "half"): Choice("cublas", "{source}"),' in entries
    assert len({entry.split(": Choice")[0] for entry in entries}) == len(entries)
    table: dict[tuple[str, str, str], tile_tables.Choice] = eval(
        "{" + "".join(entries) + "}", {"Choice": tile_tables.Choice, "Config": tile_tables.Config}
    )
    assert all(choice.source.startswith("measured: bench/results/") for choice in table.values())
    written["rule"] = selection_rule.choose_all(written)
    assert entries[0] in report.summary(written)


def test_entries_of_forced_tiles_and_constants() -> None:
    """A forced tile comes first in its list; a constant of a module, and a size that another variant wins, are comments."""
    tile, programs = "triton F 64x128x64 w4 s4", "triton pool 16x64 w4 1056"
    written = sizes("forward", linear=ONES, **{tile.replace(" ", "_"): [1.0] * 4, "triton": [2.0] * 4})
    written["header"] |= {"compute capability": "9.0", "date": "2027-01-02T03:04", "gpu": "NVIDIA X"}
    found_entries = list(table_entries.lines(written))
    assert found_entries[0].startswith(
        '("forward", "hopper", "half"): Choice((Config(classes=64, rows=128, dims=64, warps=4,'
    )
    assert found_entries[0].count("Config(") == len(tile_tables.choice("forward", "hopper", "half"))
    assert found_entries[0].endswith('"measured: bench/results/nvidia-x-2027-01-02.json, bf16 forward"),')
    written = sizes("loss", linear=ONES, triton_loss_kept=[1.0] * 4, triton=[2.0] * 4)
    assert f"# gistops.backends.eager_loss: MAX_KEPT_BYTES = {1 << 40}" in "".join(
        table_entries.lines(written)
    )
    ratios = [1.0, 1.0, 1.0, 0.5]
    written = sizes("loss", linear=ONES, triton=ONES, **{programs.replace(" ", "_"): ratios})
    written["cases"][3]["variants"][programs]["inexact"] = "too far"
    assert not list(table_entries.lines(written)), "a variant with wrong results disputes nothing"


# The page


def test_the_page_has_header_tables_and_reasons() -> None:
    written = document(
        linear=LINEAR,
        cuda=found(1.2, 1.2, roofline=0.71, memory=3 << 20, host_ms=0.1),
        CCE={"skipped": "a|b"},
    )
    written["constants"] = {"copy": {"ms": 1.0, "value": 3e12}, "launch gap": {"ms": 1e-3, "value": 1e-3}}
    written["rule"] = selection_rule.choose_all(written)
    page = report.render(written)
    assert "- torch: 2.11.0" in page
    assert "driver" not in page  # unknown
    assert "test: **3 failed**" in page
    assert "- copy: 3000 GB/s" in page
    assert "- launch gap: 1.0 µs" in page
    assert "bf16 forward: **cuda** (1.20 × F.linear over 1 of 4 sizes)" in page
    assert "| | 256×8142×2048 |" in page
    assert "| gistops, cuda | 1.20 (1.2 ms; 9; 71%; 3 MiB; host 100 µs) |" in page
    assert "| CCE |" not in page.split("## Not measured")[0]
    assert r"CCE: a\|b" in page
    assert "the time was up (" in page
    widths = [
        [line.count(" |") for line in block.splitlines()] for block in page.split("\n\n") if block[0] == "|"
    ]
    assert all(len({w for w in lines if w}) == 1 for lines in widths)


def test_kernels_are_listed_per_call() -> None:
    rows = [{"kernel": "gemm, big", "launches": 2.0, "us": 30.0}]
    profile = result(Case("bf16", MAIN, "profile", ("cuda",)), cuda={"kernels": {"step": rows}})
    (row,) = csv.DictReader(io.StringIO(torch_profiler.kernels_csv([profile])))
    assert row["kernel"] == "gemm, big"
    assert (row["us_each"], row["us_per_call"], row["launches_per_call"]) == ("15.00", "30.00", "2")
    assert "| step | cuda | 2 | 30 | gemm, big 30.0 |" in report.render(document() | {"profiles": [profile]})


# The files


def test_files_are_written_atomically_without_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written = document(linear=LINEAR)
    with output.Output(folder, written, report.render) as made:
        log = made.logs["tests.log"].part("pytest a")
        log.write_text("1 passed\n", encoding="utf-8")
        made.texts["kernels.csv"] = "a,b\n"
        written["cases"][0]["variants"]["linear"] = found(1.0, 1.3)
        made.write()
        read = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert read["cases"][0]["variants"]["linear"]["ratio"]["median"] == 1.3
        assert "===== pytest a\n1 passed" in (folder / "tests.log").read_text(encoding="utf-8")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["kernels.csv", "result.json", "table.md", "tests.log"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_cannot_be_written_is_noted(tmp_path: Path) -> None:
    def broken(document: dict[str, Any]) -> str:
        raise RuntimeError("no page")

    written = document(linear=LINEAR)
    with output.Output(tmp_path / "out", written, broken):
        pass
    read = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert read["not written"] == {"table.md": "RuntimeError: no page"}


def test_logs_and_runs_stay_small(tmp_path: Path) -> None:
    cut = output.cut("a" * 500 + "b" * 500, 400)
    assert len(cut) < 400
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "log.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "seed0" / "model.pt").write_bytes(b"x" * (output.MAX_ARCHIVED_BYTES + 1))
    with tarfile.open(fileobj=io.BytesIO(output.pack(tmp_path))) as tar:
        assert [name.split("/", 1)[1] for name in tar.getnames()] == ["seed0/log.jsonl"]
