"""Tests of model files: every row of the results table is computed again from the file alone, and older files load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gistops.nn import TwoHeadClassifier
from train.config import Config
from train.data.dataset import Dataset
from train.evaluation.evaluate import evaluate
from train.model.model import ModelFileError, load_model, read_model_file, save_model
from train.trained import describe, load_trained
from train.training.trainer import Trainer

from .conftest import REPOSITORY, write_image
from .short_runs import FEATURES, IMAGES, finish

ALTERNATIVES = {
    "gist": {"random head, adjusted", "both heads", "centers alone"},
    "gist-rotation": {"random head, adjusted", "both heads", "centers alone"},
    "gist-mlp": {"random head, adjusted", "both heads", "centers alone"},
    "cos-gist": {"random head, adjusted", "both heads"},
    "gist-combined": {"centers alone"},
    "cos-cs-cb": {"centers alone"},
    "plain": {"adjusted afterwards"},
    "balanced-softmax": set(),
    "fslwf": set(),
    "oltr": set(),
    "lfme": set(),
    "ncm": set(),
    "crt": set(),
    "tau-norm": set(),
    "lws": set(),
}


def trained(method: str, config: Config, data: Dataset, file: Path) -> Trainer:
    short = config.replace(
        stage2_epochs=1, max_steps_per_epoch=2, prior_strength=0.7, split_rule="paper_code"
    )
    trainer = Trainer(method, short, data)
    finish(trainer)
    details = describe(method, short, data)
    save_model(file, trainer.model, data.class_names, details)
    return trainer


@pytest.mark.parametrize("method", ALTERNATIVES)
def test_every_row_of_the_table_comes_from_the_file(method: str, features: Dataset, tmp_path: Path) -> None:
    trainer = trained(method, FEATURES, features, tmp_path / "model")
    expected = trainer.evaluate(final=True)
    loaded = load_trained(tmp_path / "model")
    assert loaded.method_name == method
    own, others = evaluate(
        loaded.model, features.x_test, features.y_test, 5, loaded.method.alternative_scores
    )
    counts, rule = loaded.train_counts, loaded.split_rule
    assert own.accuracy(counts, rule) == expected["accuracy"]
    assert {name: other.accuracy(counts, rule) for name, other in others.items()} == expected.get(
        "accuracy_of", {}
    )
    assert others.keys() == ALTERNATIVES[method]
    loaded.model.eval()
    scores = loaded.scores(features.x_test)
    assert scores.keys() == {"", *ALTERNATIVES[method]}
    again = torch.bincount(features.y_test[scores[""].argmax(1) == features.y_test], minlength=5)
    assert torch.equal(again, own.correct)


def test_a_file_holds_all_that_inference_needs(images: Dataset, tmp_path: Path) -> None:
    trainer = trained("gist", IMAGES.replace(crop_size=8), images, tmp_path / "model")
    loaded = load_trained(tmp_path / "model")
    assert loaded.image_size == [10, 10]
    assert loaded.model.normalize.crop_size == 8
    mean, std = images.mean_std()
    assert torch.equal(loaded.model.normalize.mean.flatten(), mean)
    assert torch.equal(loaded.model.normalize.std.flatten(), std)
    assert loaded.class_names == images.class_names
    assert loaded.train_counts.tolist() == [120, 60, 30, 15, 7]
    assert loaded.shot_groups == ["many", "medium", "medium", "few", "few"]
    assert torch.equal(loaded.method.log_prior, 0.7 * (images.train_counts / 232).log())
    trainer.model.eval()
    assert torch.equal(loaded.scores(images.x_test[:7])[""], trainer.model(images.x_test[:7]))


@pytest.mark.parametrize("method", ["gist", "cos-gist", "gist-rotation"])
def test_a_model_with_both_heads_classifies_as_their_row(
    method: str, features: Dataset, tmp_path: Path
) -> None:
    """In float64, in which no two classes are equal up to rounding."""
    trained(method, FEATURES, features, tmp_path / "model")
    model, names = load_model(tmp_path / "model", heads="both")
    assert isinstance(model.head, TwoHeadClassifier)
    assert names == features.class_names
    loaded, x = load_trained(tmp_path / "model"), features.x_test.double()
    model.double()
    loaded.model.double()
    row, logits = loaded.scores(x)["both heads"], model(x)
    torch.testing.assert_close(logits.log_softmax(1), row.log_softmax(1), atol=1e-9, rtol=0)
    own, _ = evaluate(model, x, features.y_test, 5)
    _, rows = evaluate(loaded.model, x, features.y_test, 5, loaded.method.alternative_scores)
    assert torch.equal(own.correct, rows["both heads"].correct)
    assert torch.equal(model.eval().head.predict(model.features(x)), row.argmax(1))


def test_a_model_with_one_head_has_no_second(features: Dataset, tmp_path: Path) -> None:
    trained("plain", FEATURES, features, tmp_path / "model")
    with pytest.raises(ValueError, match=r"heads: expected 'balanced' for .*model, which has one head"):
        load_model(tmp_path / "model", heads="both")
    with pytest.raises(ValueError, match="heads: expected 'balanced' or 'both', got 'random'"):
        load_model(tmp_path / "model", heads="random")  # type: ignore[arg-type]


def test_files_of_earlier_versions_load(features: Dataset, tmp_path: Path) -> None:
    """They have the head for inference alone, and a shorter description."""
    trained("gist", FEATURES, features, tmp_path / "model")
    description, state = read_model_file(tmp_path / "model")
    names = ("backbone", "classes", "crop_size", "transform", "hidden_features")
    earlier = {name: tensor for name, tensor in state.items() if "random" not in name}
    assert len(earlier) < len(state)
    metadata = {"train": json.dumps({name: description[name] for name in names})}
    safetensors.torch.save_file(earlier, tmp_path / "earlier", metadata)
    models = [load_model(tmp_path / name)[0] for name in ("model", "earlier")]
    assert torch.equal(*(model(features.x_test) for model in models))
    with pytest.raises(ModelFileError, match="earlier of an earlier version, which does not name its method"):
        load_trained(tmp_path / "earlier")


def test_the_example_of_the_documentation(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"### Inference\n.*?```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs" / "birds").mkdir(parents=True)
    model = trained("gist", IMAGES, images, tmp_path / "runs" / "birds" / "model-gist.safetensors").model
    write_image(tmp_path / "bird.jpg", (250, 10, 10))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["images"].shape == (1, 3, 10, 10)
    assert found["images"].dtype == torch.uint8
    model.eval()
    with torch.no_grad():
        logits = model(found["images"])
    assert found["classes"] == [images.class_names[int(logits.argmax())]]
    torch.testing.assert_close(found["probabilities"], logits.softmax(1))
    assert isinstance(found["both"].head, TwoHeadClassifier)
