"""Trains each method of a run, from its first step or from a checkpoint.

From top to bottom: `run` takes the methods one after another; `train` takes one model through its stages and writes
down what happens; `Training` is all that a checkpoint must hold, and its `step` is the training itself. The same seed
gives the same bits on the CPU, whether the run was interrupted or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gistops.sampling import ClassBalancedBatchSampler

from .analysis import analyse
from .config import Config
from .data.arrays import Dataset
from .data.augment import Augmentation
from .data.streams import BalancedStream, RandomStream
from .display import Display
from .evaluate import evaluate
from .methods import METHODS
from .model import Model, build_model, save_model
from .runfiles import RunFolder

Record = dict[str, Any]
DISPLACEMENTS = ("displacements", "axis", "mlp_in", "mlp_out")
POSITION = ("stage", "epoch", "step_of_epoch", "images", "lr")


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def run(
    config: Config, data: Dataset, folder: RunFolder, display: Display, saved: Record | None
) -> list[Record]:
    """Train every method that the checkpoint `saved` has not finished; return the results of all methods."""
    records: list[Record] = saved["records"] if saved else []
    folder.restart_metrics(records)
    finished = {record["method"] for record in records if record["event"] == "result"}
    for name in config.methods:
        if name in finished:
            continue
        training = Training(name, config, data)
        if saved and saved["training"]["name"] == name:
            training.load_state_dict(saved["training"])
        train(training, folder, display, records)
    return [record for record in records if record["event"] == "result"]


def train(training: Training, folder: RunFolder, display: Display, records: list[Record]) -> None:
    """Take a model through what is left of its stages; append to `records`, the result last."""

    def save() -> None:
        folder.save_checkpoint({"training": training.state_dict(), "records": records})

    def write(record: Record) -> None:
        records.append(record)
        folder.append_metrics(record)
        save()

    config, stages = training.config, training.method.stages
    while training.stage < len(stages):
        stage = stages[training.stage]
        while training.epoch < stage.epochs:
            where = f"{training.name} {stage.name}".strip() + f" epoch {training.epoch + 1}/{stage.epochs}"
            begin, images_before = time.perf_counter(), training.images
            while training.step_of_epoch < len(training.batch_sizes):
                images, loss = training.images, training.step()
                # Reading a loss from a GPU waits for it, so it is not done at every step there.
                readable = training.device.type == "cpu" or training.step_of_epoch % 20 == 0
                display.step(where, training.images - images, loss.item() if readable else None)
                if config.checkpoint_steps and training.step_of_epoch % config.checkpoint_steps == 0:
                    save()
            seconds = time.perf_counter() - begin
            rate = (training.images - images_before) / seconds
            record = training.end_epoch() | {
                "seconds": round(seconds, 3),
                "images_per_second": round(rate, 1),
            }
            if training.epoch % config.evaluate_every == 0 or training.epoch == stage.epochs:
                record |= training.evaluate()
            write(record)
            display.epoch(where, record)
        training.begin_stage(training.stage + 1)
    folder.write(
        f"model-{training.name}.safetensors",
        lambda path: save_model(path, training.model, training.data.class_names),
    )
    result = {"event": "result", "method": training.name, "images": training.images}
    result |= training.method.describe(training.model.head) | training.evaluate(per_class=True)
    write(result | {"analysis": analyse(training.model, training.data, config.split_rule, config.seed)})


class Training:
    """One model on its way through the stages of its method: weights, optimiser, streams, position."""

    def __init__(self, name: str, config: Config, data: Dataset) -> None:
        self.name, self.config, self.data = name, config, data
        self.device = torch.device(config.device)
        self.x_train, self.y_train = data.x_train.to(self.device), data.y_train.to(self.device)
        self.x_test, self.y_test = data.x_test.to(self.device), data.y_test.to(self.device)
        # Each method starts from the seed, so that its weights do not depend on what was trained before it.
        torch.manual_seed(config.seed)
        self.method = METHODS[name](config, data.train_counts)
        model = build_model(data, config, self.method.head)
        self.model = model.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the data's order and augmentation
        self.random = RandomStream(len(data.y_train), self.generator)
        self.balanced = BalancedStream(
            ClassBalancedBatchSampler(
                data.y_train, config.classes_per_batch, config.samples_per_class, seed=config.seed
            )
        )
        self.augment = Augmentation(
            self.generator,
            config.crop_padding,
            config.flip,
            config.crop_size or 0,
            config.crop_scale,
            config.color_jitter,
        )
        self.batch_sizes = epoch_batch_sizes(config, data)
        self.images = 0
        self.begin_stage(0)

    def begin_stage(self, stage: int) -> None:
        """Keep the weights, change the head as the stage asks; optimiser and schedule start afresh."""
        self.stage, self.epoch, self.step_of_epoch, self.lr = stage, 0, 0, self.config.lr
        self.sums: dict[str, Tensor] = {}  # of the epoch's losses
        if stage == len(self.method.stages):
            return
        self.method.begin_stage(stage, self.model.head, self._sample)
        self.model.train()
        config = self.config
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        factor = lr_schedule(self.config, self.method.stages[stage].epochs, len(self.batch_sizes))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self) -> Tensor:
        """One step of SGD on one batch of both streams; returns the loss."""
        num_random, num_balanced = self.batch_sizes[self.step_of_epoch]
        num_balanced, num_random = self.method.draws(num_balanced, num_random)
        indices = torch.cat([self.balanced.take(num_balanced), self.random.take(num_random)])
        x, y = self.augment(self.x_train[indices]), self.y_train[indices]
        # Both streams go through the backbone together, and so share the statistics of its BatchNorms.
        losses = self.method.losses(self.model.head, self.model.features(x), y, num_balanced)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.detach().double()
        self.step_of_epoch += 1
        self.images += len(indices)
        return losses["loss"].detach()

    @torch.no_grad()
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Features of all training samples, without augmentation, and their classes."""
        self.model.eval()
        features = torch.cat([self.model.features(part) for part in self.x_train.split(500)])
        self.model.train()
        return features, self.y_train

    def end_epoch(self) -> Record:
        """Go to the next epoch; returns the record of the one that ends, with its mean losses."""
        means = {name: float(total) / self.step_of_epoch for name, total in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']}; a lower --lr or a longer --warmup-epochs may help")
        self.epoch, self.step_of_epoch, self.sums = self.epoch + 1, 0, {}
        record = {"event": "epoch", "method": self.name, "stage": self.stage + 1, "epoch": self.epoch}
        return record | {"images": self.images, "lr": self.lr} | means | self.method.describe(self.model.head)

    def evaluate(self, per_class: bool = False) -> Record:
        """Accuracies on the test set; nothing is chosen by them."""
        data, rule = self.data, self.config.split_rule
        found, readings = evaluate(
            self.model, self.x_test, self.y_test, data.num_classes, self.method.readings
        )
        record: Record = {"accuracy": found.accuracy(data.train_counts, rule)}
        if readings:
            record["accuracy_of"] = {
                name: e.accuracy(data.train_counts, rule) for name, e in readings.items()
            }
        if found.slot_usage is not None:
            record["slot_usage"] = found.slot_usage.tolist()
        if per_class:
            record |= {"accuracy_per_class": found.per_class(), "train_counts": data.train_counts.tolist()}
        return record

    def state_dict(self) -> Record:
        """All that the steps to come depend on, in plain types and tensors."""
        return {
            "name": self.name,
            "position": {name: getattr(self, name) for name in POSITION},
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.random.state_dict(),
            "balanced": self.balanced.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_state_dict(self, state: Record) -> None:
        """Go back to where `state_dict` was called."""
        for stage in range(1, state["position"]["stage"] + 1):
            self.begin_stage(stage)  # so that parameters and optimiser are those of the saved stage
        for name in POSITION:
            setattr(self, name, state["position"][name])
        self.sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.random.load_state_dict(state["random"])
        self.balanced.load_state_dict(state["balanced"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def parameter_groups(model: Model, config: Config) -> list[Record]:
    """Temperatures without weight decay, which would pull them down; displacements, and what moves them, apart."""
    groups: dict[str, Record] = {
        "weights": {},
        "temperatures": {"weight_decay": 0.0},
        "displacements": {"lr": config.lr * config.displacement_lr},
    }
    if config.displacement_weight_decay is not None:
        groups["displacements"]["weight_decay"] = config.displacement_weight_decay
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        own = name.removeprefix("head.")
        kind = (
            "temperatures" if own.endswith("tau") else "displacements" if own in DISPLACEMENTS else "weights"
        )
        groups[kind]["params"].append(parameter)
    return list(groups.values())


def epoch_batch_sizes(config: Config, data: Dataset) -> list[tuple[int, int]]:
    """For each step of an epoch, one pass of the random stream, the images of the random and the balanced batch."""
    full, rest = divmod(len(data.y_train), config.batch_size)
    sizes = [config.batch_size] * full + [rest] * (rest > 0)
    balanced = config.classes_per_batch * config.samples_per_class
    return [(random, balanced) for random in sizes[: config.max_steps_per_epoch]]


def lr_schedule(config: Config, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step of a stage."""

    def factor(step: int) -> float:
        done = step / max(1, epochs * steps_per_epoch)
        if config.schedule == "cosine":
            value = 0.5 * (1 + math.cos(math.pi * done))
        else:
            value = 0.1 ** sum(done >= drop for drop in config.lr_drops)
        warmup_steps = config.warmup_epochs * steps_per_epoch
        return value * min(1.0, (step + 1) / warmup_steps) if warmup_steps else value

    return factor
