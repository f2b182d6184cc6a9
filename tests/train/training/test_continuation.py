"""Tests of runs that are resumed with other options: exact where allowed, refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from train.__main__ import main
from train.config import Config, ConfigError
from train.training.continuation import continued

SHORT = "--stage1-epochs 1 --max-steps-per-epoch 3 --device cpu"


def words(feature_file: Path, runs: Path, name: str, more: str) -> list[str]:
    return f"--recipe features --data {feature_file} --runs {runs} --name {name} {SHORT} {more}".split()


def model(runs: Path, name: str, method: str) -> bytes:
    return (runs / name / f"model-{method}.safetensors").read_bytes()


def test_a_method_is_added_exactly(feature_file: Path, tmp_path: Path) -> None:
    two = "--stage2-epochs 1 --transfer-directions 3 --methods"
    assert main(words(feature_file, tmp_path, "whole", f"{two} gist plain")) == 0
    assert main(words(feature_file, tmp_path, "grown", f"{two} plain")) == 0
    assert main(words(feature_file, tmp_path, "grown", f"{two} gist plain --resume")) == 0
    for method in ("gist", "plain"):
        assert model(tmp_path, "grown", method) == model(tmp_path, "whole", method)
    records = map(json.loads, (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines())
    assert [r["method"] for r in records if r["event"] == "result"] == ["plain", "gist"]
    assert 'methods = [\n    "plain",\n    "gist",\n]' in (tmp_path / "grown" / "config.toml").read_text()


def test_a_stage_with_a_constant_learning_rate_is_made_longer_exactly(
    feature_file: Path, tmp_path: Path
) -> None:
    constant = "--schedule step --methods gist --transfer-directions 3 --warmup-epochs 1.5 --stage2-epochs"
    longer = f"{constant} 3 --lr-drops"
    assert main(words(feature_file, tmp_path, "whole", longer)) == 0
    assert main(words(feature_file, tmp_path, "grown", f"{constant} 1 --lr-drops")) == 0
    before = model(tmp_path, "grown", "gist")
    assert main(words(feature_file, tmp_path, "grown", f"{longer} --resume")) == 0
    assert model(tmp_path, "grown", "gist") == model(tmp_path, "whole", "gist") != before
    records = list(map(json.loads, (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines()))
    assert [r["event"] for r in records] == ["epoch"] * 4 + ["result"]
    assert [r["epoch"] for r in records[:4]] == [1, 1, 2, 3]


BASE = Config().replace(methods=("gist", "plain"), stage1_epochs=4, stage2_epochs=4, device="cpu", name="r")
CONSTANT = {"schedule": "step", "lr_drops": ()}
#: Options of the run, its position (method, stage from 0, epoch, finished methods), changes, and why they are refused.
CASES: list[tuple[dict[str, Any], tuple[str, int, int, list[str]], dict[str, Any], str]] = [
    ({}, ("gist", 0, 2, []), {"stage2_epochs": 9}, ""),
    ({}, ("gist", 0, 2, []), {"stage1_epochs": 9}, "the learning rate depends on the length of the stage"),
    (CONSTANT, ("gist", 0, 2, []), {"stage1_epochs": 9}, ""),
    (
        CONSTANT,
        ("gist", 0, 2, []),
        {"stage1_epochs": 3},
        "the learning rate depends on the length of the stage",
    ),
    (CONSTANT, ("gist", 1, 2, []), {"stage1_epochs": 9}, "stage 1 of gist is over"),
    (CONSTANT, ("plain", 0, 8, ["gist"]), {"stage2_epochs": 9}, "gist is finished"),
    ({"methods": ("plain",)}, ("plain", 1, 0, ["plain"]), {"stage2_epochs": 9}, "the learning rate depends"),
    (CONSTANT | {"methods": ("plain",)}, ("plain", 1, 0, ["plain"]), {"stage2_epochs": 9}, ""),
    (CONSTANT | {"methods": ("crt",)}, ("crt", 0, 2, []), {"stage2_epochs": 9}, ""),
    (CONSTANT | {"methods": ("crt",)}, ("crt", 1, 2, []), {"stage2_epochs": 9}, "stage 1 of crt is over"),
    (
        CONSTANT | {"methods": ("crt",)},
        ("crt", 1, 2, []),
        {"crt_epochs": 9},
        "--crt-epochs: expected 10 as in",
    ),
    (CONSTANT | {"methods": ("ncm",)}, ("ncm", 0, 2, []), {"stage2_epochs": 9}, ""),
    (
        CONSTANT | {"methods": ("ncm",)},
        ("ncm", 1, 0, ["ncm"]),
        {"stage2_epochs": 9},
        "ncm has changed its head after its last stage",
    ),
    (
        CONSTANT | {"methods": ("ldam-drw",)},
        ("ldam-drw", 0, 2, []),
        {"stage2_epochs": 9},
        "the loss of ldam-drw",
    ),
    (CONSTANT | {"methods": ("plain",), "ema_decay": 0.9}, ("plain", 0, 2, []), {"stage2_epochs": 9}, ""),
    (
        CONSTANT | {"methods": ("plain",), "ema_decay": 0.9},
        ("plain", 1, 0, ["plain"]),
        {"stage2_epochs": 9},
        "other weights have replaced the last ones",
    ),
    (
        CONSTANT | {"methods": ("plain",), "keep": "best"},
        ("plain", 1, 0, ["plain"]),
        {"stage2_epochs": 9},
        "other weights have replaced the last ones",
    ),
    (CONSTANT | {"methods": ("lfme",)}, ("lfme", 0, 2, []), {"stage2_epochs": 9}, "the loss of lfme"),
    ({}, ("gist", 0, 2, []), {"lr": 0.5}, "--lr: expected 0.1 as in"),
    ({}, ("gist", 0, 2, []), {"hold_out": 0.5}, "--hold-out: expected 0.0 as in"),
    ({}, ("gist", 0, 2, []), {"methods": ("plain",)}, "--methods: expected at least gist as in"),
    ({}, ("gist", 0, 2, []), {"device": "meta"}, "--device: expected 'cpu' as in"),
    ({}, ("gist", 0, 2, []), {"checkpoint_steps": 5}, ""),
]


@pytest.mark.parametrize(("options", "position", "change", "refused"), CASES)
def test_other_options_are_refused_where_a_run_would_not_continue_exactly(
    options: dict[str, Any],
    position: tuple[str, int, int, list[str]],
    change: dict[str, Any],
    refused: str,
    tmp_path: Path,
) -> None:
    before, file = BASE.replace(**options), tmp_path / "config.toml"
    file.write_text(tomli_w.dumps({k: v for k, v in before.recorded().items() if v is not None}))
    method, stage, epoch, finished = position
    saved = {
        "training": {"name": method, "position": {"stage": stage, "epoch": epoch, "step_of_epoch": 0}},
        "records": [{"event": "result", "method": name} for name in finished],
    }
    config = before.replace(**change)
    if refused:
        with pytest.raises(ConfigError) as error:
            continued(config, file, saved, torch.ones(5))
        assert refused in str(error.value)
        return
    assert continued(config, file, saved, torch.ones(5)) == config
    if finished:  # moved back to the end of the last epoch
        assert saved["training"]["position"] == {"stage": 0, "epoch": 8, "step_of_epoch": 0}
        assert saved["records"] == []


def test_a_run_on_auto_goes_on_where_auto_is_the_same_device(tmp_path: Path) -> None:
    saved = {"training": {"name": "gist", "position": {}}, "records": []}
    auto = BASE.replace(device="auto")
    for before, recorded, now, is_refused in (
        ("auto", "cpu", "cpu", False),
        ("auto", "cuda", "cpu", True),
        ("cpu", "", "auto", False),  # earlier versions wrote the device of auto
    ):
        file = tmp_path / "config.toml"
        file.write_text(
            tomli_w.dumps({k: v for k, v in BASE.replace(device=before).recorded().items() if v is not None})
        )
        (tmp_path / "environment.json").write_text(json.dumps({"device": recorded}))
        config = auto.replace(device=now)
        if now == "auto" and config.runtime.resolved_device != "cpu":
            continue
        if is_refused:
            with pytest.raises(ConfigError, match="--device: expected 'cuda'"):
                continued(config, file, saved, torch.ones(5))
        else:
            assert continued(config, file, saved, torch.ones(5)) == config
