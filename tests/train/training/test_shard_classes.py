"""--shard-classes: processes with a sharded head against one process with the joint batch and the whole head, in float64."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from train.__main__ import main
from train.config import Config, ConfigError
from train.data.sources.arrays import load_arrays
from train.evaluation.evaluate import evaluate
from train.files import WriteError
from train.model.model import load_model, save_model
from train.model.sharded_head import is_sharded, local, local_classes, whole_state
from train.training.checkpoint import DamagedFileError, load_trainer_file, save_trainer
from train.training.trainer import Trainer

from ...processes import in_group
from ..short_runs import FEATURES, IMAGES, equal, finish
from .test_full_disk import file_limit
from .test_micro_batches import TUNING, assert_same

#: Batches that cannot be halved; features as they are, so that nothing is trained but the head.
SHARDED_IMAGES = IMAGES.replace(batch_size=51, shard_classes=True)
SHARDED_FEATURES = FEATURES.replace(batch_size=51, center_features=False, shard_classes=True)


class Case(NamedTuple):
    """A stage of a method."""

    method: str
    config: Config
    stage: int = 0


#: By the number of processes, which share five classes: the last one of three has one class, the last one of four none.
CASES = {
    2: [
        Case("gist", SHARDED_IMAGES),
        Case("gist", SHARDED_IMAGES.replace(batch_norm="split"), 1),
        Case("cos-balanced-softmax", SHARDED_FEATURES.replace(center_init="means")),
        Case("gist", SHARDED_FEATURES.replace(compile=True, accumulate=2)),
        Case("gist", SHARDED_IMAGES.replace(**TUNING), 1),
    ],
    3: [
        Case("gist-mlp", SHARDED_FEATURES, 1),
        Case("gist-combined", SHARDED_FEATURES.replace(accumulate=2, balancing="prior"), 1),
        Case("gist", SHARDED_FEATURES.replace(displacement_update="residuals", transfer_directions=5), 1),
    ],
    4: [
        Case("gist-rotation", SHARDED_FEATURES, 1),
        Case("cos-cs-cb", SHARDED_IMAGES.replace(displacement_init="residuals"), 1),
        Case("ldam-drw", SHARDED_FEATURES),
        Case("cos-gist", SHARDED_FEATURES.replace(center_features=True)),
        Case("cos-balanced-softmax", SHARDED_FEATURES.replace(**TUNING)),
    ],
}


def in_float64(case: Case, file: str) -> Trainer:
    """Return a trainer in float64, where rounding does not change the outcome of a ReLU or a maximum."""
    data = load_arrays(file)
    if not data.is_images:
        data = dataclasses.replace(data, x_train=data.x_train.double(), x_test=data.x_test.double())
    trainer = Trainer(case.method, case.config, data)
    trainer.model.double()
    for stage in range(case.stage + 1):
        trainer.begin_stage(stage)
    return trainer


def whole(value: Any) -> Tensor:
    """Return all of a tensor, which may be sharded."""
    tensor: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor.detach().clone()


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    parameters = trainer.model.named_parameters()
    return {name: whole(p.grad) for name, p in parameters if p.grad is not None}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in trainer.model.state_dict().items()}


def steps_and_result(case: Case, file: str) -> tuple[list[dict[str, Tensor]], dict[str, Any], Trainer]:
    """Take three steps; return their gradients, the records of the epoch and of the result, and the trainer."""
    trainer = in_float64(case, file)
    steps = []
    for _ in range(3):
        trainer.step()
        steps.append(gradients(trainer))
    return steps, trainer.end_epoch() | trainer._result(), trainer


def _as_one_process(rank: int, size: int, folder: str, file: dict[bool, str]) -> None:
    for case, (wanted, expected) in zip(CASES[size], torch.load(f"{folder}/expected.pt"), strict=True):
        steps, record, trainer = steps_and_result(case, file[case.config.model.backbone == "none"])
        centers = trainer.model.head.centers
        assert is_sharded(trainer.model.head)
        assert len(local(centers)) == len(local_classes(centers)) < 5
        for step, (found, gradient) in enumerate(zip(steps, wanted, strict=True)):
            try:
                assert_same(found, gradient)
            except AssertionError as error:
                raise AssertionError(f"{case.method}, process {rank}, step {step}: {error}") from None
        for name in ("accuracy", "accuracy_per_class", "images"):
            assert record[name] == expected[name], (case, name)
        assert record.get("accuracy_of") == expected.get("accuracy_of"), case.method
        numbers = [name for name in expected if name.startswith(("loss", "tau", "mean", "displ", "slot"))]
        assert "loss" in numbers
        for name in numbers:
            assert record[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (case, name)
        found, expected = record["analysis"], expected["analysis"]
        assert found["confusion"] == expected["confusion"]
        assert found["calibration"]["error"] == pytest.approx(expected["calibration"]["error"], abs=1e-6)
        assert found.get("common_slot") == pytest.approx(expected.get("common_slot"), abs=1e-6)
        assert [row[:2] for row in found["map"]["vectors"]] == [row[:2] for row in expected["map"]["vectors"]]


@pytest.mark.parametrize("size", CASES)
def test_processes_get_the_gradients_and_results_of_one_with_the_whole_head(
    size: int, image_file: Path, feature_file: Path, tmp_path: Path
) -> None:
    files = {False: str(image_file), True: str(feature_file)}
    alone = [steps_and_result(case, files[case.config.model.backbone == "none"])[:2] for case in CASES[size]]
    folder = tmp_path / "group"
    folder.mkdir()
    torch.save(alone, folder / "expected.pt")
    in_group(_as_one_process, size, folder, size, str(folder), files)


def _evaluates(rank: int, folder: str, file: str) -> None:
    """Evaluate parts of 18, 18 and 17 samples in batches of 6 or 1, of which the last process has one less than the others."""
    trainer = in_float64(Case("gist", SHARDED_FEATURES, 1), file)
    x, y = trainer.data.x_test[:53], trainer.data.y_test[:53]
    for expected, n, batch_size in torch.load(f"{folder}/expected.pt"):
        found, _ = evaluate(trainer.model, x[:n], y[:n], 5, batch_size=batch_size)
        assert torch.equal(found.correct, expected["correct"])
        assert torch.equal(found.total, expected["total"])
        torch.testing.assert_close(found.slot_usage, expected["slot_usage"])


def test_the_last_batch_of_an_evaluation_may_be_empty_in_some_processes(
    feature_file: Path, tmp_path: Path
) -> None:
    trainer = in_float64(Case("gist", SHARDED_FEATURES, 1), str(feature_file))
    expected = []
    for n, batch_size in ((53, 6), (53, 17), (53, 1), (2, 6)):
        found, _ = evaluate(trainer.model, trainer.data.x_test[:n], trainer.data.y_test[:n], 5)
        expected.append((vars(found), n, batch_size))
    folder = tmp_path / "group"
    folder.mkdir()
    torch.save(expected, folder / "expected.pt")
    in_group(_evaluates, 3, folder, str(folder), str(feature_file))


WHOLE_RUN = Case(
    "gist", SHARDED_IMAGES.replace(transfer_directions=3)
)  # 15 steps, 10 of them in the second stage


def _continues(rank: int, file: str, checkpoint: str, steps: int | None) -> None:
    """Continue the run of a checkpoint, if there is one, for a number of steps or to the end; save it again."""
    trainer = in_float64(WHOLE_RUN, file)
    path = Path(checkpoint)
    if path.exists():
        trainer.load_state_dict(load_trainer_file(path)["training"])
    finish(trainer, steps)
    save_trainer(path, trainer, {})
    state = whole_state(trainer.model)
    if rank == 0:
        save_model(path.with_name("model"), trainer.model, list("abcde"), state=state)


def test_a_run_goes_on_with_any_number_of_processes(image_file: Path, tmp_path: Path, seed: int) -> None:
    reference = in_float64(WHOLE_RUN, str(image_file))
    finish(reference)
    expected = weights(reference)
    rng = random.Random(seed)
    first = rng.randrange(1, 7)
    second = rng.randrange(first + 1, 13) - first
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    for size, steps in ((2, first), (3, second), (1, 2), (4, None)):
        arguments = (str(image_file), str(checkpoint), steps)
        if size == 1:  # without torch.distributed
            _continues(0, *arguments)
        else:
            (tmp_path / f"group-{size}").mkdir()
            in_group(_continues, size, tmp_path / f"group-{size}", *arguments)
        (folder,) = checkpoint.parent.glob("checkpoint-head-*")  # older ones are removed
        assert torch.load(checkpoint, weights_only=True)["training"]["head_folder"] == folder.name
    resumed = in_float64(WHOLE_RUN, str(image_file))
    resumed.load_state_dict(load_trainer_file(checkpoint)["training"])
    assert resumed.stage == 2
    found = weights(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    model, _ = load_model(checkpoint.with_name("model"))
    x = reference.data.x_test
    with torch.no_grad():
        logits = reference.model.eval()(x)
        torch.testing.assert_close(model.double()(x), logits, rtol=1e-6, atol=1e-6)


def _same_bits(rank: int, file: str, folder: str, stop: int, more: dict[str, Any]) -> None:
    data = load_arrays(file)
    config = SHARDED_IMAGES.replace(stage2_epochs=1, precision="bf16", **more)
    uninterrupted = Trainer("gist", config, data)
    expected = finish(uninterrupted)
    first = Trainer("gist", config, data)
    records = finish(first, stop)
    checkpoint = Path(folder) / "checkpoint.pt"
    save_trainer(checkpoint, first, {})
    torch.distributed.barrier()
    second = Trainer("gist", config, data)
    second.load_state_dict(load_trainer_file(checkpoint)["training"])
    assert records + finish(second) == expected
    assert equal(second.state_dict(), uninterrupted.state_dict())
    assert equal(weights(second), weights(uninterrupted))


@pytest.mark.parametrize("more", [{}, TUNING])
def test_the_same_number_of_processes_goes_on_to_the_same_bits(
    more: dict[str, Any], image_file: Path, tmp_path: Path, seed: int
) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "run").mkdir()
    stop = random.Random(seed).randrange(1, 10)
    in_group(_same_bits, 2, tmp_path / "group", str(image_file), str(tmp_path / "run"), stop, more)


def saved_run(file: Path, folder: Path) -> tuple[Trainer, Path]:
    """Return a trainer after a step, and its checkpoint."""
    trainer = Trainer("gist", SHARDED_FEATURES, load_arrays(str(file)))
    trainer.step()
    checkpoint = folder / "checkpoint.pt"
    save_trainer(checkpoint, trainer, {})
    return trainer, checkpoint


def test_a_checkpoint_with_a_damaged_folder_is_refused(feature_file: Path, tmp_path: Path) -> None:
    trainer, checkpoint = saved_run(feature_file, tmp_path)
    state = load_trainer_file(checkpoint)["training"]
    (folder,) = tmp_path.glob("checkpoint-head-*")
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"--resume: expected a whole checkpoint, got {folder}, which is"):
        trainer.load_state_dict(state)
    (folder / ".metadata").unlink()
    with pytest.raises(DamagedFileError, match=f"folder {folder} is missing or damaged"):
        load_trainer_file(checkpoint)


def test_a_save_that_fails_or_is_killed_leaves_the_last_checkpoint(
    feature_file: Path, tmp_path: Path
) -> None:
    trainer, checkpoint = saved_run(feature_file, tmp_path)
    before = weights(trainer)
    finish(trainer, 2)
    with file_limit(500), pytest.raises(WriteError, match=f"^{tmp_path}/checkpoint-head-2: "):
        save_trainer(checkpoint, trainer, {})
    again = Trainer("gist", SHARDED_FEATURES, load_arrays(str(feature_file)))
    again.load_state_dict(load_trainer_file(checkpoint)["training"])
    assert equal(weights(again), before)
    save_trainer(checkpoint, trainer, {})  # removes what the last save left
    assert [folder.name for folder in tmp_path.glob("checkpoint-head-*")] == ["checkpoint-head-3"]
    again.load_state_dict(load_trainer_file(checkpoint)["training"])
    assert equal(weights(again), weights(trainer))


def test_options_that_cannot_work_are_refused(
    feature_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--recipe features --data {feature_file} --runs {tmp_path} --device cpu --classes-per-batch 3 --shard-classes"
    assert main([*words.split(), "--methods", "gist", "plain", "oltr"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --methods: expected gist, cos-cb, cos-cs-cb, cos-gist, gist-combined")
    assert message.endswith("cos-balanced-softmax, ldam-drw with --shard-classes, got plain, oltr\n")
    assert main([*words.split(), "--methods", "gist", "--precision", "fp16"]) == 2
    expected = "error: --precision: expected float32 or bf16 with --shard-classes, got 'fp16'"
    assert expected in capsys.readouterr().err
