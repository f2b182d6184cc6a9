"""Tests of `python -m train ablation`: a run per seed, a table over all runs, and no repeated work."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from train.__main__ import main

SHORT = "--stage1-epochs 1 --stage2-epochs 1 --classes-per-batch 3 --batch-size 50 --device cpu"


def results_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "result"]


def test_runs_per_seed_are_summarized_and_not_repeated(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --name grid --methods gist plain {SHORT}"
    )
    assert main(["ablation", *args.split(), "--seeds", "3", "5"]) == 0
    found = {seed: results_of(tmp_path / "grid" / f"seed-{seed}") for seed in (3, 5)}
    text = (tmp_path / "grid" / "table.md").read_text()
    assert text in capsys.readouterr().out
    overall = [100 * found[seed][0]["accuracy"]["overall"] for seed in (3, 5)]
    expected = f"| {statistics.fmean(overall):.1f} ± {statistics.stdev(overall):.1f} |"
    (row,) = (line for line in text.splitlines() if line.startswith("| GistNet (COS+CS+GIST) |"))
    assert expected in row
    assert "| plain softmax: adjusted afterwards |" in text
    assert "seeds 3, 5" in text

    before = (tmp_path / "grid" / "seed-3" / "metrics.jsonl").stat().st_mtime_ns
    model = tmp_path / "grid" / "seed-3" / "model-gist.safetensors"
    written = model.stat().st_mtime_ns
    assert main(["ablation", *args.split(), "--seeds", "3", "5", "4"]) == 0
    assert model.stat().st_mtime_ns == written, "a finished run was trained again"
    assert (tmp_path / "grid" / "seed-3" / "metrics.jsonl").stat().st_mtime_ns >= before
    assert results_of(tmp_path / "grid" / "seed-3") == found[3]
    assert "seeds 3, 5, 4" in (tmp_path / "grid" / "table.md").read_text()


def test_records_that_are_lost_come_from_the_checkpoint_again(feature_file: Path, tmp_path: Path) -> None:
    """The lines of a killed run may be incomplete; the same command ended in a traceback."""
    args = f"ablation --recipe features --data {feature_file} --runs {tmp_path} --name a --methods plain {SHORT} --seeds 0 1"
    assert main(args.split()) == 0
    table = (tmp_path / "a" / "table.md").read_text()
    files = [tmp_path / "a" / f"seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    records = [file.read_text() for file in files]
    files[0].unlink()
    files[1].write_text(records[1][:-20])
    assert main(args.split()) == 0
    assert [file.read_text() for file in files] == records
    assert (tmp_path / "a" / "table.md").read_text() == table


def test_changed_options_are_refused(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"ablation --recipe features --data {feature_file} --runs {tmp_path} --methods plain {SHORT} --seeds 0"
    assert main(args.split()) == 0
    assert main([*args.split(), "--lr", "0.5"]) == 2
    assert "--lr: expected" in capsys.readouterr().err
    assert main([*args.split(), "1", "1"]) == 2
    assert "--seeds: expected at least one seed, each once, got (0, 1, 1)" in capsys.readouterr().err
    assert main([*args.split(), "1", "-1"]) == 2
    assert "--seed: expected at least 0, got -1" in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed-1")), "seed 1 was trained before the next one was refused"


def test_values_and_seeds_of_earlier_commands_stay_in_the_table(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        f"ablation --recipe features --data {feature_file} --runs {tmp_path} --name g --methods plain {SHORT}"
    )
    assert main([*args.split(), "--seeds", "0", "--vary", "lr=0.1,0.2"]) == 0
    assert main([*args.split(), "--seeds", "0", "1", "--vary", "lr=0.4"]) == 0
    text = (tmp_path / "g" / "table.md").read_text()
    assert "over seeds 0, 1;" in text
    for row in ("lr=0.4 |", "lr=0.1, seeds 0 only |", "lr=0.2, seeds 0 only |"):
        assert f"| plain softmax, {row}" in text
    assert main([*args.split(), "--seeds", "0", "--vary", "momentum=0.5", "--split-rule", "paper_text"]) == 2
    expected = (
        f"--split-rule: expected 'standard' as in the earlier runs in {tmp_path / 'g'}, or another --name"
    )
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "g" / "momentum=0.5").exists()
    assert main([*args.split(), "--vary", "lr=0.1,0.1"]) == 2
    assert "--vary: expected each value once" in capsys.readouterr().err

    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "g"), "--out", str(page)]) == 0
    assert all(f"lr={lr}/seed-0: plain softmax" in page.read_text() for lr in (0.1, 0.2, 0.4))
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(page)]) == 2
    assert "--folders: expected folders of finished runs" in capsys.readouterr().err


def test_a_table_of_the_paper_trains_its_rows_once_in_its_order(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Figures take most of the time of so many short runs.
    monkeypatch.setattr("train.run.write_report", lambda *_: None)
    monkeypatch.setattr("train.training.trainer.analyze", lambda *_: {})
    args = f"ablation --recipe features --data {feature_file} --runs {tmp_path} --name t {SHORT} --seeds 0".split()
    assert main([*args, "--methods", "balanced-softmax", "plain"]) == 0
    model = tmp_path / "t" / "seed-0" / "model-plain.safetensors"
    written = model.stat().st_mtime_ns
    assert main([*args, "--table", "3"]) == 0
    assert model.stat().st_mtime_ns == written, "a finished method was trained again"
    text = (tmp_path / "t" / "table.md").read_text()
    assert text in capsys.readouterr().out
    methods, _, _ = text.partition("Other scores")
    assert [line.split(" | ")[0] for line in methods.splitlines() if line.startswith("| ")][1:] == [
        "| plain softmax",
        "| COS+CB",
        "| COS+CS+CB",
        "| GistNet (COS+CS+GIST)",
        "| COS+GIST",
        "| w/v combined",
        "| GistNet, rotation",
        "| GistNet, MLP",
        "| GistNet (COS+CS+GIST), m = 2",
        "| GistNet (COS+CS+GIST), m = 8",
        "| GistNet (COS+CS+GIST), m = 16",
        "| balanced softmax",  # of the run without --table
    ]
    for m, slots in ((2, 3), (8, 9), (16, 17)):
        (found,) = results_of(tmp_path / "t" / f"num-displacements={m}" / "seed-0")
        assert (found["method"], len(found["slot_usage"])) == ("gist", slots)
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("model-*.safetensors")}
    assert len(models) == 12
    assert main([*args, "--table", "3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert (tmp_path / "t" / "table.md").read_text() == text


@pytest.mark.parametrize(
    "more", [["--methods", "gist", "plain"], ["--methods=gist"], ["--vary", "lr=0.1,0.2"]]
)
def test_a_table_has_rows_of_its_own(
    more: list[str], feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ablation", "--data", str(feature_file), "--runs", str(tmp_path), "--recipe", "features"]
    assert main([*args, "--table", "3", *more]) == 2
    option = more[0].partition("=")[0]
    assert f"--table: expected no {option} beside it" in capsys.readouterr().err
    # Before Python 3.11, a pattern that ends with a slash matches files too.
    assert not [path for path in tmp_path.glob("features*") if path.is_dir()]
