"""The settings of PyTorch that a program may have changed do not change the driver, nor does the driver change them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from train.data.dataset import Dataset
from train.surroundings import usual_settings

from .short_runs import FEATURES


@contextlib.contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_settings_of_the_program_change_no_bit(features: Dataset, feature_file: Path, tmp_path: Path) -> None:
    config = FEATURES.replace(data=str(feature_file), stage1_epochs=1, stage2_epochs=1, methods=("gist",))
    expected = train.fit(config, runs=str(tmp_path / "usual"))["gist"]["model"]
    classifier = train.load(expected)
    x, y = features.x_test, features.y_test

    def outcome() -> list[Any]:
        predicted, results = (
            classifier.predict(x),
            classifier.evaluate(x, y, classifier.class_bias("uniform")),
        )
        return [predicted.probabilities.tolist(), results.confidence.tolist(), results.record]

    usual = outcome()
    settings = {
        "float64": float64(),
        "meta": torch.device("meta"),
        "no grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    for name, setting in settings.items():
        with setting:
            found = train.fit(config, runs=str(tmp_path / name))["gist"]["model"]
            weight = next(train.load(found).trained.model.parameters())
            assert outcome() == usual, name
            assert torch.is_grad_enabled() == (name not in ("no grad", "inference"))
            assert torch.is_autocast_enabled("cpu") == (name == "autocast")
        assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
        assert found.read_bytes() == expected.read_bytes(), name


def test_an_error_and_a_call_within_a_call_leave_the_settings() -> None:
    def fail() -> None:
        with usual_settings(), usual_settings():
            assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float32, "cpu")
            raise ValueError("within")

    with float64(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with pytest.raises(ValueError, match="within"):
            fail()
        assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float64, "meta")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_threads_leave_the_default_dtype_of_the_program() -> None:
    """All threads share it. The first one ends while the second one, which has found float32, goes on."""
    began, may_end = threading.Event(), threading.Event()
    found = []

    def second() -> None:
        with usual_settings():
            began.set()
            may_end.wait(300)
            found.append(torch.get_default_dtype())

    thread = threading.Thread(target=second)
    with float64():
        with usual_settings():
            thread.start()
            assert began.wait(300)
        may_end.set()
        thread.join()
        assert found == [torch.float32]
