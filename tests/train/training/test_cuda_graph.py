"""`GraphedSteps` without the capture itself, which needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import Config
from train.data.dataset import Dataset
from train.training.cuda_graph import WARM_UP_STEPS, GraphedSteps, tensor_learning_rates
from train.training.trainer import Trainer

from ..short_runs import equal

CONFIG = Config().replace(backbone="none", batch_size=50, classes_per_batch=3, samples_per_class=4, stage1_epochs=2, stage2_epochs=2,
    lr=0.0625, lr_drops=(), device="cpu", center_features=True, displacement_update="residuals",
    transfer_directions=5,
)  # fmt: skip
Step = Callable[[], Tensor]


def finish(trainer: Trainer, capture: Callable[[Step], Step] | None = None) -> list[dict[str, Any]]:
    """Train to the end, with steps captured by `capture` instead of CUDA graphs; return the records of the epochs."""
    records = []
    while trainer.stage < len(trainer.method.stages):
        if capture:
            trainer.graphed = GraphedSteps(trainer, capture)
        while trainer.epoch < trainer.method.stages[trainer.stage].epochs:
            while trainer.step_of_epoch < trainer.steps_per_epoch:
                trainer.step()
            records.append(trainer.end_epoch())
        trainer.begin_stage(trainer.stage + 1)
    return records


class Recorder:
    """Replays a step by calling it again, with the current contents of the tensors that it reads."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Step) -> Step:
        self.captures += 1

        def replay() -> Tensor:
            self.replays += 1
            return step()

        return replay


@pytest.mark.parametrize("method", ["gist", "cos-balanced-softmax"])
@pytest.mark.parametrize("way", [{}, {"accumulate": 2}, {"precision": "bf16"}, {"mixup": 0.5}])
def test_held_steps_are_the_eager_ones(way: dict[str, Any], method: str, features: Dataset) -> None:
    config = CONFIG.replace(**way)
    eager, held, recorder = Trainer(method, config, features), Trainer(method, config, features), Recorder()
    assert finish(held, recorder) == finish(eager)
    assert equal(held.state_dict(), eager.state_dict())
    stages = len(eager.method.stages)
    assert recorder.captures == stages
    assert recorder.replays == 4 * (eager.steps_per_epoch - 1) - stages * WARM_UP_STEPS, (
        "an epoch's last step is another's"
    )


def test_rates_follow_the_schedule(features: Dataset) -> None:
    config = CONFIG.replace(schedule="cosine", warmup_epochs=1)
    eager, held = Trainer("gist", config, features), Trainer("gist", config, features)
    records = finish(held, Recorder()), finish(eager)
    for mine, theirs in zip(*records, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["lr"] == theirs["lr"]
    for mine, theirs in zip(held.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    groups = held.optimizer.param_groups
    with tensor_learning_rates(held.optimizer, [torch.zeros(()) for _ in groups]):
        assert all(isinstance(group["lr"], Tensor) for group in groups)
    assert not any(isinstance(group["lr"], Tensor) for group in groups)


def test_a_capture_that_fails_is_said_and_the_steps_are_taken(features: Dataset) -> None:
    def capture(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    eager, held = Trainer("plain", CONFIG, features), Trainer("plain", CONFIG, features)
    with pytest.warns(RuntimeWarning, match=r"--cuda-graph: .* one by one, .* not permitted when"):
        records = finish(held, capture)
    assert records == finish(eager)
    assert equal(held.state_dict(), eager.state_dict())


def test_a_step_reads_nothing_on_the_host(features: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step must not read a value on the host: on a GPU it would wait, and the capture would fail."""
    trainer = Trainer("gist", CONFIG, features)
    trainer.begin_stage(1)
    parts = trainer.batches.next()
    trainer.optimize(parts)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read")

    looked = [name for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu")]
    for name in looked:
        monkeypatch.setattr(Tensor, name, refuse)
    monkeypatch.setattr(
        "gistops._checks._readable", lambda value: False
    )  # values are checked on the CPU alone
    trainer.optimize(parts)


def test_asked_for_in_vain(features: Dataset) -> None:
    with pytest.warns(RuntimeWarning, match="--cuda-graph: CUDA graphs are not available on cpu, so"):
        trainer = Trainer("plain", CONFIG.replace(cuda_graph=True), features)
    assert trainer.graphed is None
    trainer.step()


def test_made_ahead_goes_on_with_graphs(features: Dataset) -> None:
    """A checkpoint of batches that are prepared ahead can be loaded into batches that are not."""
    trainer = Trainer("gist", CONFIG, features)
    made = trainer.batches
    ahead = type(made)(
        made.x,
        made.y,
        made.random,
        made.balanced,
        made.sizes,
        made.augment,
        made.generator,
        made.transfer_generator,
        (made.local_indices, made.num_micro_batches),
        ahead=True,
        subset=made.subset,
        mixing=made.mixing,
    )
    for _ in range(3):
        ahead.next()
    state, (fourth,) = ahead.state_dict(), ahead.next()
    made.load_state_dict(state)
    (drawn,) = made.next_draws()
    assert torch.equal(made.materialize(drawn).x, fourth.x)
    assert torch.equal(made.materialize(drawn).transfer_uniforms, fourth.transfer_uniforms)


def test_the_network_is_compiled_once_for_the_usual_size(
    images: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch is not compiled, and later stages do not compile again."""
    compiled: list[Any] = []
    sizes: list[int] = []

    def compile(function: Any, **_: Any) -> Any:
        compiled.append(function)

        def run(x: Tensor) -> Tensor:
            sizes.append(len(x))
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    config = CONFIG.replace(backbone="resnet8-half", compile=True, stage1_epochs=1, stage2_epochs=1)
    for way in ({}, {"batch_norm": "split"}, {"accumulate": 2}):
        compiled.clear()
        sizes.clear()
        trainer = Trainer("cos-gist", config.replace(**way), images)
        finish(trainer)
        assert compiled == [trainer.model.features]
        usual = {"joint": [62] * 8, "split": [12, 50] * 8 + [12, 12]}[trainer.config.model.batch_norm]
        assert sorted(sizes) == sorted([31] * 16 if trainer.config.optim.accumulate == 2 else usual)
