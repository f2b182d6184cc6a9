"""What the report is made of, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.font_manager import findSystemFonts, fontManager
from PIL import Image

from train.__main__ import main
from train.data.dataset import Dataset
from train.evaluation.analysis import BINS, analyze, calibration, common_slot, confusion, feature_map
from train.methods import TITLES
from train.report.figures import (
    CJK_FONTS,
    accuracy_by_size,
    installed_cjk_fonts,
    mean_accuracy_by_size,
    render,
)
from train.report.html import write_page
from train.training.trainer import Training

from ..conftest import COUNTS
from ..test_engine import FEATURES, finish

SHORT = "--stage1-epochs 1 --stage2-epochs 1 --classes-per-batch 3 --batch-size 50 --device cpu"


def test_calibration_by_hand() -> None:
    confidence = torch.tensor([0.05, 0.05, 0.95, 0.95, 0.95, 1.0])
    correct = torch.tensor([False, True, True, True, False, True])
    found = calibration(confidence, correct)
    assert [count for _, _, count in found["bins"]] == [2, 4]
    assert found["bins"][0][:2] == pytest.approx([0.05, 0.5])
    assert found["bins"][1][:2] == pytest.approx([0.9625, 0.75])
    assert found["error"] == pytest.approx((2 * 0.45 + 4 * 0.2125) / 6)
    exact = torch.rand(100_000)
    assert calibration(exact, torch.rand(100_000) < exact)["error"] < 0.01
    assert len(calibration(exact, exact > 0)["bins"]) == BINS


def test_common_slot_by_hand() -> None:
    slots = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 2], [2, 1, 0, 2]], dtype=torch.uint8)
    assert common_slot(slots).tolist() == [1.0, 0.5, 0.5]


def test_of_many_few_shot_classes_the_most_confused_are_listed(
    features: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = features.y_test.clone()
    predicted[(features.y_test == 4).nonzero().flatten()[:5]] = 0
    predicted[(features.y_test == 3).nonzero().flatten()[:3]] = 0
    monkeypatch.setattr("train.evaluation.analysis.LISTED_CLASSES", 1)
    assert [row["class"] for row in confusion(predicted, features, "standard")] == ["4"]


def test_confusion_by_hand(features: Dataset) -> None:
    """Classes 3 and 4 are few-shot, 20 test samples each."""
    predicted = features.y_test.clone()
    third = (features.y_test == 3).nonzero().flatten()
    predicted[third[:12]] = 1
    predicted[third[12:15]] = 0
    rows = confusion(predicted, features, "standard")
    assert [row["class"] for row in rows] == ["3", "4"]
    assert rows[0] == {"class": "3", "training": 15, "accuracy": 0.25, "taken for": [["1", 0.6], ["0", 0.15]]}
    assert rows[1]["taken for"] == []


def test_confusion_of_many_classes_one_at_a_time(seed: int) -> None:
    counts = torch.randint(1, 40, (60,))
    y = torch.randint(1, 60, (700,))  # none is of class 0
    data = Dataset(y, y, y, y, [f"c{k}" for k in range(60)], counts)
    predicted = torch.where(torch.rand(700) < 0.3, y, (y + torch.randint(1, 6, (700,)) ** 2) % 60)
    found = {row["class"]: row for row in confusion(predicted, data, "standard")}
    assert len(found) == int((torch.bincount(y, minlength=60)[counts < 20] > 0).sum())
    for name, row in found.items():
        own = predicted[y == int(name[1:])]
        others = sorted(Counter(own.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))
        shares = [[f"c{k}", n / len(own)] for k, n in others if f"c{k}" != name]
        right = dict(others).get(int(name[1:]), 0) / len(own)
        assert (row["accuracy"], row["taken for"]) == (right, shares[:3])


@pytest.mark.parametrize("method", ["gist", "plain", "gist-rotation"])
def test_the_map_holds_each_classs_samples_and_vectors(method: str, features: Dataset) -> None:
    training = Training(method, FEATURES.replace(num_displacements=2), features)
    finish(training)
    found = feature_map(training.model, features, seed=0)
    assert len(found["classes"]) == 5
    assert len(found["samples"]) == 100
    slots = [(name, slot) for name, slot, _, _ in found["vectors"]]
    expected = [(name, slot) for name in found["classes"] for slot in range(3)] if method == "gist" else []
    assert slots == expected
    assert found == feature_map(training.model, features, seed=0)


def test_analysis_leaves_training_as_it_was(features: Dataset) -> None:
    training = Training("gist", FEATURES, features)
    training.step()
    before = training.state_dict()["model"]
    rng = torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    analyze(training.model, features, "standard", 0)
    assert training.model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict()["model"].items())


def test_a_page_of_a_run_before_counts_were_recorded(tmp_path: Path) -> None:
    accuracy = dict.fromkeys(("overall", "many", "medium", "few"), 0.5)
    result = {
        "event": "result",
        "method": "plain",
        "images": 7,
        "accuracy": accuracy,
        "accuracy_per_class": [0.5],
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
    assert len(Page((tmp_path / "page.html").read_text()).images) == 2  # loss and accuracies


def test_accuracy_by_class_size_by_hand() -> None:
    few = {"train_counts": [5, 80, 20], "accuracy_per_class": [0.25, 1.0, None]}
    assert mean_accuracy_by_size(few) == [(80, 100), (5, 25)]
    counts = list(range(1, 26))  # ten parts, of two or three: 25 and 24, 23 to 21, …, 3 to 1
    many = {"train_counts": counts, "accuracy_per_class": [count / 25 for count in counts]}
    expected = [(size, 4 * size) for size in (24.5, 22, 19.5, 17, 14.5, 12, 9.5, 7, 4.5, 2)]
    assert [value for pair in mean_accuracy_by_size(many) for value in pair] == pytest.approx(
        [value for pair in expected for value in pair]
    )


def test_names_of_classes_may_be_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with fonts that were installed after matplotlib made its list."""
    there = [file for file in findSystemFonts() if Path(file).name in CJK_FONTS.values()]
    if not there:
        pytest.skip(f"none of {', '.join(CJK_FONTS.values())} is installed")
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if f.fname not in there])
    installed_cjk_fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of what a font does not have
        render(lambda axes: axes.plot([0, 1], label="一 is a class"))
    installed_cjk_fonts.cache_clear()


class Page(HTMLParser):
    """Counts what a page holds, and fails for what it would have to fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:image/png;base64,")
                self.images.append(base64.b64decode(value.partition(",")[2]))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_runs_page_and_a_comparison(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--recipe features --data {feature_file} --runs {tmp_path} {SHORT}".split()
    assert main([*args, "--name", "<one>", "--methods", "gist", "plain"]) == 0
    page = Page((tmp_path / "<one>" / "report.html").read_text())
    assert len(page.images) == 1 + 6 + 4  # a plain head has neither slots nor a constellation
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
    assert len(both.images) == 1 + 10 + 5  # no slots without displacements
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    results = {f"{tmp_path / '<one>'}: {TITLES[r['method']]}": r for r in records if r["event"] == "result"}
    results |= {f"{tmp_path / 'two'}: {TITLES[r['method']]}": r for r in two if r["event"] == "result"}
    assert [result["train_counts"] for result in results.values()] == [list(COUNTS)] * 3
    assert both.images[0] == accuracy_by_size(results)
    assert both.images[0] != accuracy_by_size(dict(list(results.items())[:2]))
    assert re.search(r"two: COS\+GIST", both.words)
    assert main(["report", str(tmp_path)]) == 2
    assert "--folders: expected folders of finished runs" in capsys.readouterr().err
