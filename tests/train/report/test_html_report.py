"""The HTML page: what it contains, records of early versions, and the comparison of runs."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from train.__main__ import main
from train.methods import TITLES
from train.report.figures import (
    accuracy_by_size,
)
from train.report.html import read_records, write_page

from ..conftest import COUNTS

SHORT = "--stage1-epochs 1 --stage2-epochs 1 --classes-per-batch 3 --batch-size 50 --device cpu"


def test_results_of_early_versions_are_shown(tmp_path: Path) -> None:
    accuracy = dict.fromkeys(("overall", "many", "medium", "few"), 0.5)
    result = {
        "event": "result",
        "method": "plain",
        "images": 7,
        "accuracy": accuracy,
        "accuracy_per_class": [0.5],
        "accuracy_of": {"a name from an early version": accuracy},
    }
    epoch = {
        "event": "epoch",
        "method": "plain",
        "images": 7,
        "loss": 1.0,
        "split": "test",
        "accuracy": accuracy,
    }
    write_page(tmp_path / "page.html", {"old": [epoch, result]}, "old", "")
    page = Page((tmp_path / "page.html").read_text())
    assert "plain softmax: a name from an early version" in page.words
    assert len(page.images) == 2  # losses and accuracies


def test_names_of_early_versions_are_those_of_today(tmp_path: Path) -> None:
    scores = {"centres alone": {"overall": 0.5}, "both heads": {"overall": 0.6}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "result", "accuracy_of": scores}) + "\n")
    (record,) = read_records(tmp_path)
    assert record["accuracy_of"] == {"centers alone": {"overall": 0.5}, "both heads": {"overall": 0.6}}


class Page(HTMLParser):
    """A parser that collects the figures and words of a page, and fails if the page loads other files."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe")
        for name, value in attrs:
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
                if value.startswith("data:image/png"):
                    self.images.append(base64.b64decode(value.partition(",")[2]))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_of_a_run_and_a_comparison(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "<one>", "--methods", "gist", "plain"]) == 0
    page = Page((tmp_path / "<one>" / "report.html").read_text())
    assert len(page.images) == 1 + 6 + 4  # a plain head has no slots and no centers
    assert page.images[0] == (tmp_path / "<one>" / "accuracy.png").read_bytes()
    assert all(Image.open(io.BytesIO(png)).size[0] > 300 for png in page.images)
    records = [json.loads(line) for line in (tmp_path / "<one>" / "metrics.jsonl").read_text().splitlines()]
    for result in (record for record in records if record["event"] == "result"):
        assert f"{100 * result['accuracy']['overall']:.1f}" in page.words
    for words in (
        "<one>",
        "GistNet (COS+CS+GIST)",
        "plain softmax",
        "adjusted afterwards",
        "Few-shot classes",
    ):
        assert words in page.words
    assert main([*args, "--name", "two", "--methods", "cos-gist"]) == 0
    out = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "<one>"), str(tmp_path / "two"), "--out", str(out)]) == 0
    both = Page(out.read_text())
    assert len(both.images) == 1 + 10 + 5  # a head without displacements has one slot
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    results = {f"{tmp_path / '<one>'}: {TITLES[r['method']]}": r for r in records if r["event"] == "result"}
    results |= {f"{tmp_path / 'two'}: {TITLES[r['method']]}": r for r in two if r["event"] == "result"}
    assert [result["train_counts"] for result in results.values()] == [list(COUNTS)] * 3
    assert both.images[0] == accuracy_by_size(results)
    assert both.images[0] != accuracy_by_size(dict(list(results.items())[:2]))
    assert re.search(r"two: COS\+GIST", both.words)
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "--folders: expected folders of finished runs" in capsys.readouterr().err
