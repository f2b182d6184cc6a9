"""Steps that are split into micro-batches, processes and streams; half precision, torch.compile, batches prepared ahead."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train import distributed
from train.config import Config
from train.data.dataset import Dataset
from train.data.sources.arrays import load_arrays
from train.training.trainer import Trainer

from ...processes import in_group
from ..short_runs import FEATURES, IMAGES, equal, finish

#: Batches that cannot be halved; features as they are, as statistics over a micro-batch are its own.
UNEVEN = IMAGES.replace(batch_size=51)
PLAIN_FEATURES = FEATURES.replace(batch_size=51, center_features=False)

#: Options of fine-tuning.
TUNING: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "clip_gradient_norm": 0.5,
    "ema_decay": 0.5,
    "label_smoothing": 0.1,
}


def in_float64(method: str, config: Config, data: Dataset) -> Trainer:
    """Return a trainer in float64, where rounding does not change the outcome of a ReLU or a maximum."""
    if not data.is_images:
        data = dataclasses.replace(data, x_train=data.x_train.double(), x_test=data.x_test.double())
    trainer = Trainer(method, config, data)
    trainer.model.double()
    trainer.begin_stage(0)
    return trainer


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that gradients are equal up to rounding, relative to the largest gradient of each parameter."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).abs().max()
        part = 1e-9 if value.dtype == torch.float64 else 2e-4
        assert difference <= part * value.abs().max() + part / 1000, (
            f"{name}: {difference} of {value.abs().max()}"
        )


@pytest.mark.parametrize("method", ["gist", "plain", "cos-cb", "gist-combined", "cb-focal"])
def test_micro_batches_add_up_to_the_gradients_of_the_step(method: str, features: Dataset) -> None:
    whole = in_float64(method, PLAIN_FEATURES, features)
    parts = in_float64(method, PLAIN_FEATURES.replace(accumulate=4), features)
    for _ in range(3):
        losses = whole.step(), parts.step()
        assert_same(gradients(parts), gradients(whole))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    for name in ("loss", *whole.loss_sums):
        torch.testing.assert_close(parts.loss_sums[name], whole.loss_sums[name], rtol=1e-4, atol=1e-6)
    assert whole.images == parts.images


def test_micro_batches_of_displaced_features_too(features: Dataset) -> None:
    config = PLAIN_FEATURES.replace(transfer_directions=5)
    trained = []
    for accumulate in (1, 4):
        trainer = in_float64("gist", config.replace(accumulate=accumulate), features)
        trainer.begin_stage(1)
        trainer.model.double()
        trainer.step()
        trained.append(gradients(trainer))
    assert_same(*trained)


def test_streams_share_statistics_or_not(images: Dataset) -> None:
    seen: dict[str, list[int]] = {}
    for choice in ("joint", "split"):
        trainer = Trainer("gist", IMAGES.replace(batch_norm=choice), images)
        sizes = seen[choice] = []
        norm: Any = trainer.model.backbone.bn1
        norm.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        trainer.step()
    assert seen == {"joint": [62], "split": [12, 50]}


def _as_one_process(rank: int, folder: str, method: str, config: Config) -> None:
    trainer = in_float64(method, config, load_arrays(f"{folder}/data.npz"))
    expected = torch.load(f"{folder}/expected.pt")
    for step, wanted in enumerate(expected["steps"]):
        trainer.step()
        try:
            assert_same(gradients(trainer), wanted)
        except AssertionError as error:
            raise AssertionError(f"process {rank}, step {step}: {error}") from None
    state = trainer.evaluated_model.state_dict()
    for name, wanted in expected["state"].items():
        torch.testing.assert_close(state[name], wanted, rtol=1e-6, atol=1e-9)
    record = trainer.evaluate(final=True)
    assert record["accuracy_per_class"] == expected["record"]["accuracy_per_class"]
    torch.testing.assert_close(record.get("slot_usage"), expected["record"].get("slot_usage"))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gist", {}),
        ("gist", {"batch_norm": "split"}),
        ("plain", {}),
        ("cos-cb", {"center_features": False}),
        ("gist", TUNING),
    ],
    ids=["joint", "split", "plain", "one stream", "fine-tuning"],
)
def test_processes_get_the_gradients_of_one_with_the_joint_batch(
    method: str, changes: dict[str, Any], image_file: Path, tmp_path: Path
) -> None:
    config = UNEVEN.replace(**changes)
    alone = in_float64(method, config, load_arrays(str(image_file)))
    steps = []
    for _ in range(3):
        alone.step()
        steps.append(gradients(alone))
    assert any(isinstance(m, nn.BatchNorm2d) for m in alone.model.modules())
    state = alone.evaluated_model.state_dict()
    expected = {"steps": steps, "state": state, "record": alone.evaluate(final=True)}
    folder = tmp_path / "group"
    folder.mkdir()
    torch.save(expected, folder / "expected.pt")
    image_file.rename(folder / "data.npz")
    in_group(_as_one_process, 2, folder, str(folder), method, config)


WAYS: dict[str, dict[str, Any]] = {
    "micro-batches": {"accumulate": 3},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "split, bf16": {"batch_norm": "split", "precision": "bf16", "accumulate": 2},
}


def resumed_equals_whole(config: Config, data: Dataset, stop: int) -> Trainer:
    """Train with and without an interruption after `stop` steps; check that both reach the same bits."""
    whole = Trainer("gist", config, data)
    expected = finish(whole)
    first = Trainer("gist", config, data)
    records = finish(first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Trainer("gist", config, data)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert records + finish(second) == expected
    assert equal(second.state_dict(), whole.state_dict())
    return whole


@pytest.mark.parametrize("way", WAYS)
def test_goes_on_to_the_same_bits(way: str, images: Dataset, seed: int) -> None:
    config = IMAGES.replace(stage2_epochs=1, **WAYS[way])
    stop = int(torch.randint(1, 9, ()))
    whole = resumed_equals_whole(config, images, stop)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}


def test_half_precision_is_used_and_learns(images: Dataset) -> None:
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config = IMAGES.replace(precision=precision, stage1_epochs=4, stage2_epochs=4)
        trainer = Trainer("gist", config, images)
        seen: list[torch.dtype] = []
        convolution: Any = trainer.model.backbone.conv1
        convolution.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.dtype))
        records = finish(trainer)
        assert set(seen) == {dtype}
        assert records[-1]["loss"] < records[0]["loss"]
        assert trainer.evaluate()["accuracy"]["overall"] > 0.5


def test_the_scaler_leaves_out_a_step_that_overflows(features: Dataset) -> None:
    trainer = Trainer("plain", PLAIN_FEATURES.replace(precision="fp16"), features)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.scaler.get_scale() < 2.0**127


def test_compiled_the_same_gradients_and_resumed(features: Dataset, seed: int) -> None:
    config = PLAIN_FEATURES.replace(stage1_epochs=1, stage2_epochs=1)
    eager, compiled = (Trainer("gist", config.replace(compile=choice), features) for choice in (False, True))
    for trainer in (eager, compiled):
        torch.manual_seed(seed)
        trainer.begin_stage(1)
    for _ in range(3):
        eager.step()
        compiled.step()
        assert_same(gradients(compiled), gradients(eager))
    resumed_equals_whole(config.replace(compile=True), features, 4)


def test_steps_made_ahead_are_the_same_and_go_on(images: Dataset) -> None:
    def batches(ahead: bool) -> Any:
        made = Trainer("gist", UNEVEN, images).batches
        return type(made)(
            made.x,
            made.y,
            made.random,
            made.balanced,
            made.sizes,
            made.augment,
            made.generator,
            made.transfer_generator,
            (made.local_indices, made.num_micro_batches),
            ahead=ahead,
            subset=made.subset,
            mixing=made.mixing,
        )

    def taken(source: Any, count: int) -> list[Any]:
        return [(p.x, p.y, p.num_balanced, p.loss_weights) for _ in range(count) for p in source.next()]

    expected = taken(batches(False), 13)
    first = batches(True)
    assert equal(taken(first, 7), expected[:7])
    state = first.state_dict()
    second = batches(True)
    second.load_state_dict(state)
    assert equal(taken(second, 6), expected[7:])


def _resumes(rank: int, file: str, config: Config) -> None:
    resumed_equals_whole(config, load_arrays(file), 6)


@pytest.mark.parametrize("way", [{}, {"precision": "bf16", "accumulate": 2, "batch_norm": "split"}])
def test_processes_go_on_to_the_same_bits(way: dict[str, Any], image_file: Path, tmp_path: Path) -> None:
    config = IMAGES.replace(stage2_epochs=1, **way)
    (tmp_path / "group").mkdir()
    in_group(_resumes, 2, tmp_path / "group", str(image_file), config)


def _compiled(rank: int, file: str, config: Config) -> None:
    trainer = Trainer("gist", config, load_arrays(file))
    eager = Trainer("gist", config.replace(compile=False), load_arrays(file))
    for _ in range(2):
        trainer.step()
        eager.step()
        assert_same(gradients(trainer), gradients(eager))


def test_processes_compiled(feature_file: Path, tmp_path: Path) -> None:
    config = PLAIN_FEATURES.replace(compile=True, accumulate=2)
    (tmp_path / "group").mkdir()
    in_group(_compiled, 2, tmp_path / "group", str(feature_file), config)


def _draws_its_own(rank: int, file: str, config: Config) -> None:
    Trainer("gist", config, load_arrays(file))
    draws = distributed.all_gather(torch.rand(8))
    assert not torch.equal(*draws)


def test_each_process_draws_its_own_dropout(feature_file: Path, tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    in_group(_draws_its_own, 2, tmp_path / "group", str(feature_file), PLAIN_FEATURES)


LAUNCHED = "--standalone --local-addr 127.0.0.1 --nproc-per-node 2"


def ran(command: list[str]) -> str:
    """Run a command and return its output; after a timeout, kill it with all the processes that it started."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said[-3000:]
    return said


def test_a_run_by_torchrun(tmp_path: Path) -> None:
    """Two processes train as one process does, up to rounding, and a single process can resume the run."""
    options = [
        "--recipe",
        "smoke",
        "--device",
        "cpu",
        "--methods",
        "cos-gist",
        "gist",
        "--checkpoint-steps",
        "3",
    ]
    options += ["--displacement-update", "residuals", "--transfer-directions", "6", "--runs", str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *LAUNCHED.split()]
    alone = [sys.executable, "-m", "train", "--name", "alone", *options]
    together = [*launcher, "-m", "train", "--name", "together", *options]
    for command in (alone, together):
        said = ran(command)
    assert said.count("written to") == 1, said
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    )
    assert len(one) == len(two)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
    for records in (one, two):  # GistNet goes on from COS+GIST's first stage
        kept = [r for r in records if r["event"] == "epoch" and r["stage"] == 1]
        assert [(r["method"], r["loss"]) for r in kept[1:]] == [("gist", kept[0]["loss"])]
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {
        p.name for p in (tmp_path / "together").iterdir()
    }
    ran([sys.executable, "-m", "train", "--name", "together", *options, "--resume"])


def test_fewer_samples_than_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.__main__ import main

    assert main(f"--recipe smoke --runs {tmp_path} --batch-size 4 --accumulate 5".split()) == 2
    words = "--batch-size: expected at least 5, a sample per process and micro-batch (1 × 5), got 4"
    assert words in capsys.readouterr().err
