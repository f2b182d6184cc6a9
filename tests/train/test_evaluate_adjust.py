"""Tests of `evaluate --adjust`: other class priors at test time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train
from train.data.dataset import Dataset
from train.methods import METHODS
from train.model.model import save_model
from train.trained import describe
from train.training.trainer import Trainer

from .short_runs import FEATURES, finish
from .test_evaluate_command import error_of, evaluated


def save(method: str, data: Dataset, folder: Path, **options: Any) -> Path:
    """Train with a method for a few steps and write the model."""
    short = FEATURES.replace(max_steps_per_epoch=3, stage2_epochs=1, **options)
    trainer = Trainer(method, short, data)
    finish(trainer)
    save_model(
        folder / f"{method}.safetensors", trainer.model, data.class_names, describe(method, short, data)
    )
    return folder / f"{method}.safetensors"


@pytest.mark.parametrize(
    ("method", "exponent"), [("plain", 1.0), ("balanced-softmax", 0.5), ("gist", 0.5), ("cos-cb", 0.0)]
)
def test_scores_are_adjusted_to_another_prior(
    method: str,
    exponent: float,
    feature_file: Path,
    features: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save(method, features, tmp_path, prior_strength=0.5, balancing="prior")
    prior = tmp_path / "prior.csv"
    prior.write_text("class,count\n4,10\n0,1\n2,0\n1,0.5\n3,2\n", encoding="utf-8")
    target = torch.tensor([1, 0.5, 0, 2, 10], dtype=torch.float64)
    training = features.train_counts.double() / features.train_counts.sum()
    classifier = train.load(model)
    assert classifier.trained.prior_exponent == exponent
    logits = classifier.trained.scores(features.x_test)[""].double()
    probabilities = logits.softmax(1) * target / training**exponent
    best = (probabilities / probabilities.sum(1, keepdim=True)).max(1)
    scores = classifier.evaluate(features.x_test, features.y_test, classifier.class_bias(str(prior)))
    assert torch.equal(scores.predicted, best.indices)
    assert not (scores.predicted == 2).any()
    torch.testing.assert_close(scores.confidence.double(), best.values, atol=1e-5, rtol=1e-5)
    found = evaluated(capsys, model, feature_file, "--adjust", str(prior))
    assert found["accuracy"]["overall"] == float((best.indices == features.y_test).double().mean())
    own = classifier.evaluate(features.x_test, features.y_test)
    assert found["accuracy_of"]["as after training"] == own.accuracy
    names = {0.0: "uniform", 0.5: "training to the power 0.5", 1.0: "training"}
    assert found["assumed_prior"] == names[exponent]


def test_a_prior_that_the_scores_assume_changes_nothing(features: Dataset, tmp_path: Path) -> None:
    for method, same in (("plain", "training"), ("gist", "uniform"), ("oltr", "uniform")):
        assert train.load(save(method, features, tmp_path)).class_bias(same).abs().max() < 1e-6


def test_plain_softmax_with_a_uniform_prior_is_the_row_of_the_table(
    features: Dataset, tmp_path: Path
) -> None:
    classifier = train.load(save("plain", features, tmp_path))
    own = classifier.evaluate(features.x_test, features.y_test)
    found = classifier.evaluate(features.x_test, features.y_test, classifier.class_bias("uniform"))
    assert found.accuracy == own.record["accuracy_of"]["adjusted afterwards"] != own.accuracy


def test_an_unknown_prior_must_be_named(
    features: Dataset, feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save("focal", features, tmp_path)
    options = ("--data", str(feature_file), "--adjust", "uniform")
    assert "--assumed-prior: expected uniform or training with --adjust" in error_of(capsys, model, *options)
    found = evaluated(capsys, model, feature_file, "--adjust", "uniform", "--assumed-prior", "training")
    assert (found["adjust"], found["assumed_prior"]) == ("uniform", "training")
    assert found["title"].endswith(", adjusted to uniform")  # the row of the table
    classifier = train.load(model)
    frequencies = features.train_counts / features.train_counts.sum()
    torch.testing.assert_close(classifier.class_bias("uniform", "training"), -frequencies.log())


def test_the_methods_whose_prior_is_known(features: Dataset) -> None:
    known = {
        name
        for name, make in METHODS.items()
        if make(FEATURES, features.train_counts).prior_exponent is not None
    }
    unknown = {"gist-combined", "focal", "cb-focal", "ldam-drw", "fslwf", "lfme", "ncm", "tau-norm"}
    assert known == METHODS.keys() - unknown


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "got PATH"),
        ("name,count\n0,1\n", "with the first line 'name,count'"),
        ("class,count\nemu,1\n", "each class of the model once, got 'emu' (PATH, row 2)"),
        ("class,count\n4,1\n4,1\n", "got '4' again (PATH, row 3)"),
        ("class,count\n4,-1\n", "counts of at least 0, got '-1' (PATH, row 2)"),
        ("class,count\n4,many\n", "counts of at least 0, got 'many'"),
        ("class,count\n4,1,2\n", "a class and a count in each row"),
        ("class,count\n4,1\n", "got PATH without 4 of 5: 0, 1, 2, 3"),
        ("class,count\n0,0\n1,0\n2,0\n3,0\n4,0\n", "a class with a count above 0"),
        (None, "No such file"),
    ],
)
def test_faults_of_a_prior_are_named(
    text: str | None,
    error: str,
    features: Dataset,
    feature_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prior.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    found = error_of(
        capsys, save("gist", features, tmp_path), "--data", str(feature_file), "--adjust", str(path)
    )
    assert found.startswith("error: --adjust: expected ")
    assert error.replace("PATH", str(path)) in found
