"""Options of a command line that have no effect beside the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.__main__ import main
from train.config import Config
from train.methods import METHODS
from train.methods.softmax import SoftmaxClassifier
from train.methods.two_stage import TwoStageMethod
from train.unused_options import NEEDS, unused_options

from .short_runs import FEATURES

USED = {
    "backbone": "resnet10",
    "data": ".",  # a folder
    "hold_out_val": 0.1,
    "methods": ("cb-focal", "crt", "gist", "tau-norm"),
    "schedule": "step",
    "transfer_directions": 4,
    "tune": "lora",
}


def test_each_option_has_an_effect_with_what_it_needs_alone() -> None:
    unused = FEATURES.replace(
        data="f.npz", methods=("focal",), schedule="cosine", optimizer="adamw", tune="all"
    )
    args = [f"--{name.replace('_', '-')}" for name in NEEDS]
    found = list(unused_options([unused], args))
    assert [line.split()[0] for line in found] == args
    assert "--lr-drops has no effect without --schedule step" in found
    assert "--crt-epochs has no effect without --methods crt" in found
    assert list(unused_options([unused], [])) == []
    assert list(unused_options([unused, Config().replace(**USED)], args)) == []
    assert list(unused_options([unused], ["--lr_drops=0.5"])) == [
        "--lr-drops has no effect without --schedule step"
    ]


def test_options_of_methods_have_an_effect_on_those_that_read_them() -> None:
    counts = torch.tensor([90, 60, 30, 20, 10])
    config = Config().replace(
        displacement_init="residuals", displacement_update="residuals", center_init="means"
    )
    for name, make in METHODS.items():
        method, other = (make(config.replace(balanced_loss_weight=weight), counts) for weight in (0.5, 0.7))
        balanced = make(config.replace(balancing="prior"), counts)
        two = isinstance(method, TwoStageMethod)
        displaced = isinstance(method, TwoStageMethod) and method.num_displacements > 0
        cosine = isinstance(method, SoftmaxClassifier) and method.cosine
        uses = {
            "balanced_loss_weight": method.loss_coefficients != other.loss_coefficients,
            "balancing": method.stages[0].streams != balanced.stages[0].streams,
            "center_init": two or cosine,
            "num_displacements": displaced,
            "displacement_init": displaced and getattr(method, "transform", "") == "translation",
            "transfer_directions": displaced and getattr(method, "transfers_features", False),
        }
        for option, is_used in uses.items():
            assert NEEDS[option].is_met(config.replace(methods=(name,))) == is_used, (name, option)
    assert NEEDS["transfer_directions"].what == "--methods gist, gist-rotation or gist-mlp"


def test_a_run_warns(feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--recipe features --data {feature_file} --methods plain --stage1-epochs 1 --stage2-epochs 0 --device cpu"
    assert main([*words.split(), "--runs", str(tmp_path), "--flip", "--tau-norm", "0.5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert lines == [
        "warning: --flip has no effect without a network (--backbone)",
        "warning: --tau-norm has no effect without --methods tau-norm",
    ]


def test_doctor_lists_them(feature_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"doctor --recipe features --data {feature_file} --device cpu --flip".split()) == 1
    assert "problem: --flip has no effect without a network (--backbone)\n" in capsys.readouterr().out


def test_an_ablation_warns_of_those_that_no_run_uses(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trained equal runs for the values of such an option in silence."""
    words = f"ablation --recipe features --data {feature_file} --methods plain --stage1-epochs 1 --stage2-epochs 0 --device cpu"
    args = [*words.split(), "--runs", str(tmp_path), "--seeds", "0", "--lr-drops", "0.5", "--momentum", "0.5"]
    assert main([*args, "--vary", "optimizer=sgd,adamw", "tau-norm=0.5,0.7"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert lines == [
        "warning: --lr-drops has no effect without --schedule step",
        "warning: --tau-norm has no effect without --methods tau-norm",
    ]
