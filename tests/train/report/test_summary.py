"""The summary in words: differences by hand, and a sentence for each cause of worry and none without one."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from train.evaluation.analysis import packed
from train.report.differences import difference, difference_of_group, standard_error
from train.report.summary import Summary, summarize
from train.report.trained import trained_methods

COUNTS = [500, 50, 5, 4]  # training samples: one many-, one medium- and two few-shot classes
TESTED = [100, 100, 100, 100]


def a_result(method: str, correct: list[int], **more: Any) -> dict[str, Any]:
    """Return a result that classifies the first `correct` of each class's 100 test samples correctly."""
    bits = np.concatenate([np.arange(100) < n for n in correct])
    shares = [n / 100 for n in correct]
    accuracy = {
        "overall": sum(correct) / 400,
        "many": shares[0],
        "medium": shares[1],
        "few": (shares[2] + shares[3]) / 2,
    }
    analysis = {
        "calibration": {"error": 0.02, "bins": [[0.5, 0.5, 400]]},
        "correct": base64.b64encode(np.packbits(bits).tobytes()).decode(),
    }
    record = {"event": "result", "method": method, "images": 9, "accuracy": accuracy, "analysis": analysis}
    return record | {"accuracy_per_class": shares, "train_counts": COUNTS, "test_counts": TESTED} | more


def an_epoch(method: str, loss: float, split: str = "validation") -> dict[str, Any]:
    return {"event": "epoch", "method": method, "stage": 1, "images": 9, "loss": loss, "split": split}


FACTS = {
    "event": "data",
    "data": "birds.csv",
    "samples": "images",
    "train": 559,
    "validation": 40,
    "test": 400,
    "class_names": ["owl", "jay", "kite", "gull"],
    "split_rule": "standard",
    "backbone": "timm/ResNet",
    "seed": 3,
    "pairs": {},
}


def summary_of(*records: dict[str, Any]) -> Summary:
    return summarize(trained_methods({"run": [FACTS, *records]}))


def test_standard_error_by_hand() -> None:
    first, second = a_result("gist", [100, 100, 50, 50]), a_result("plain", [100, 100, 48, 44])
    assert standard_error(first) == pytest.approx((302 / 404 * 102 / 404 / 404) ** 0.5)
    assert standard_error(a_result("gist", [100] * 4)) == pytest.approx((402 / 404 * 2 / 404 / 404) ** 0.5)
    # Eight of 400 samples are correct for the first method alone, none for the second alone.
    paired = difference(first, second, same_samples=True)
    assert paired is not None
    assert paired.value == pytest.approx(0.02)
    assert paired.error == pytest.approx((0.02 * 0.98 / 400) ** 0.5)
    independent = difference(first, second, same_samples=False)
    assert independent is not None
    assert independent.error == pytest.approx(((302 / 404 * 102 / 404 + 294 / 404 * 110 / 404) / 404) ** 0.5)
    assert paired.is_clear
    assert not independent.is_clear
    few = difference_of_group(first, second, [False, False, True, True])
    assert few is not None
    assert few.value == pytest.approx(0.04)  # of 0.02 and 0.06
    assert few.error == pytest.approx(0.02)
    assert difference_of_group(first, second, [False, False, False, True]) is None


def test_correct_samples_are_stored_by_class() -> None:
    y = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0])
    correct = torch.tensor([True, False, False, True, True, False, True, True, False])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed(correct, y)), dtype=np.uint8), count=9)
    assert bits.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0]


def test_the_summary_says_what_was_trained_and_who_won() -> None:
    summary = summary_of(a_result("gist", [90, 60, 50, 50]), a_result("plain", [95, 55, 10, 20]))
    assert summary.trained == [
        "Trained on birds.csv: 559 images of 4 classes, with 500 training samples in the largest class and 4 in the smallest. "
        "400 images are for testing, 40 for validation.",
        "Backbone timm/ResNet, seed 3.",
    ]
    best, few, seed = summary.outcome
    assert best == (
        "Best overall: GistNet (COS+CS+GIST). It classifies 62.5 % of the test images correctly, plain softmax 45.0 %. "
        "The lead is 17.5 points, with a standard error of 2.1."
    )
    assert few == (
        "Best on the 2 few-shot classes (at most 5 training samples): GistNet (COS+CS+GIST), with 50.0 % against 15.0 % of "
        "plain softmax. The lead is 35.0 points, with a standard error of 5.0."
    )
    assert "one seed" in seed
    assert summary.worries == []


def test_a_small_difference_is_none_or_may_be_chance() -> None:
    equal = summary_of(a_result("gist", [90, 61, 30, 30]), a_result("plain", [90, 60, 31, 30])).outcome
    assert equal[0] == (
        "No method is clearly best overall: the shares of correct test images of GistNet (COS+CS+GIST) (52.8 %) and "
        "plain softmax (52.8 %) differ by less than the standard error."
    )
    assert equal[1].startswith("No method is clearly best on the 2 few-shot classes (at most 5 training")
    small = summary_of(a_result("gist", [92, 60, 30, 30]), a_result("plain", [90, 60, 30, 31])).outcome[0]
    assert small.startswith("No method is clearly best overall")
    lead = summary_of(a_result("gist", [93, 60, 30, 30]), a_result("plain", [90, 60, 30, 30])).outcome[0]
    assert lead.endswith("it may be chance.")
    alone = summary_of(a_result("gist", [90, 60, 30, 30])).outcome[0]
    assert (
        alone == "GistNet (COS+CS+GIST) classifies 52.5 % of the test images correctly (standard error 2.5)."
    )


def test_methods_beside_the_best_are_compared_with_it_alone() -> None:
    """The third is clearly worse; the first two are equal."""
    results = [("plain", [92, 60, 30, 30]), ("gist", [92, 61, 30, 30]), ("focal", [10, 10, 10, 10])]
    two = summary_of(*(a_result(*result) for result in [*results, ("crt", [92, 60, 30, 31])])).outcome[0]
    assert "GistNet" in two
    assert "cRT" in two
    assert "Focal" not in two


def test_another_use_of_a_model_that_is_better_is_named() -> None:
    other = {"both heads": {"overall": 0.9, "many": 0.9, "medium": 0.9, "few": 0.9}}
    summary = summary_of(a_result("gist", [90, 60, 30, 30], accuracy_of=other))
    assert any("GistNet (COS+CS+GIST): both heads, 90.0 %" in sentence for sentence in summary.outcome)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"accuracy_per_class": [0.9, 0.6, 0.0, 0.3]},
            "in 1 of 2 few-shot classes not one test sample is classified correctly.",
        ),
        ({"slot_usage": [0.7, 0.295, 0.005]}, "slot δ2 is hardly used, for less than 1 %"),
        ({"slot_usage": [0.0, 0.5, 0.5]}, None),  # the bare center has no parameters
        ({"slot_usage": [1.0, 0.0, 0.0]}, "slots δ1 and δ2 are hardly used"),
        ({"test_counts": [100, 100, 0, 100]}, "1 class has no test samples"),
        (
            {"analysis": {"calibration": {"error": 0.3, "bins": [[0.9, 0.6, 400]]}}},
            "Their mean is 90 %, while 60 % of the predictions are correct",
        ),
        (
            {"analysis": {"calibration": {"error": 0.1, "bins": [[0.6, 0.5, 400]]}, "common_slot": 0.99}},
            "99 % of the classes have the same best slot",
        ),
    ],
)
def test_worries_about_a_result(changes: dict[str, Any], words: str | None) -> None:
    worries = summary_of(a_result("gist", [90, 60, 30, 30], **changes)).worries
    assert len(worries) == (words is not None)
    assert words is None or words in worries[0]


@pytest.mark.parametrize(
    ("losses", "worries"),
    [
        ([3.0, 2.0, 1.0], 0),
        ([2.0, 1.0, 1.05, 1.1], 1),
        ([2.0, 1.0, 1.01, 1.02], 0),
        ([1.0, 2.0, 1.9], 0),
        ([1.0, 2.0], 0),
    ],
)
def test_a_loss_that_rises_at_the_end(losses: list[float], worries: int) -> None:
    summary = summary_of(*(an_epoch("gist", loss) for loss in losses), a_result("gist", [90, 60, 30, 30]))
    assert len(summary.worries) == worries
    assert all("GistNet (COS+CS+GIST): the training loss rose by" in worry for worry in summary.worries)


def test_without_a_validation_split_the_summary_warns() -> None:
    summary = summary_of(an_epoch("gist", 1.0, "test"), a_result("gist", [90, 60, 30, 30]))
    assert [worry[:32] for worry in summary.worries] == ["There is no validation split, so"]


def test_runs_with_other_test_data_are_not_compared() -> None:
    birds, fish = a_result("gist", [90, 60, 30, 30]), a_result("gist", [80, 60, 30, 30])
    others = FACTS | {"data": "fish.csv", "class_names": ["cod", "eel", "ray", "tuna"]}
    runs = {"a": [FACTS, birds, a_result("plain", [50, 60, 30, 30])], "b": [others, fish]}
    summary = summarize(trained_methods(runs))
    assert [sentence.partition(":")[0] for sentence in summary.trained] == [
        "Trained on birds.csv",
        "Trained on fish.csv",
        "Backbone timm/ResNet, seed 3.",
    ]
    assert summary.outcome[0].startswith("The test data of these runs differ")
    assert summary.outcome[1].startswith("Best overall: a: GistNet (COS+CS+GIST).")
    assert "b: GistNet (COS+CS+GIST) classifies 50.0 % of the test images" in summary.outcome[3]


def test_features_have_no_backbone() -> None:
    features = FACTS | {"backbone": "none", "samples": "features"}
    summary = summarize(trained_methods({"run": [features, a_result("gist", [90, 60, 30, 30])]}))
    assert summary.trained[1:] == ["Seed 3."]


def test_runs_of_several_seeds_are_told_apart_from_methods() -> None:
    runs = {str(seed): [FACTS | {"seed": seed}, a_result("gist", [90, 60, 30, 30])] for seed in range(3)}
    summary = summarize(trained_methods(runs))
    assert summary.trained[1] == "Backbone timm/ResNet, seeds 0, 1 and 2."
    assert summary.outcome[-1].startswith("These runs have 3 seeds")


def test_few_test_samples_prove_nothing() -> None:
    calibration = {"calibration": {"error": 0.3, "bins": [[0.9, 0.6, 40]]}}
    few = {"test_counts": [10, 10, 0, 20], "slot_usage": [1.0, 0.0], "analysis": calibration}
    worries = summary_of(a_result("gist", [90, 60, 30, 30], **few)).worries
    assert [worry[:28] for worry in worries] == [
        "There are only 40 test sampl",
        "1 class has no test samples:",
    ]


def test_records_of_early_versions_are_summarized() -> None:
    results = [a_result("gist", [90, 60, 30, 30]), a_result("plain", [80, 60, 30, 30])]
    for result in results:
        for name in ("analysis", "test_counts", "train_counts", "accuracy_per_class"):
            del result[name]
    summary = summarize(trained_methods({"old": results}))
    assert summary.trained == []
    assert summary.outcome == [
        "Best overall: GistNet (COS+CS+GIST). It classifies 52.5 % of the test samples correctly, plain softmax 50.0 %."
    ]
    assert summary.worries == []
