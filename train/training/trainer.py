"""The trainer: the training loop of one method, and its step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import distributed
from ..config import Config
from ..data.dataset import Dataset
from ..data.stream.batches import MicroBatch
from ..evaluation.analysis import analyze
from ..methods import METHODS
from ..methods.method import StageData
from ..model.model import Model, build_model, save_model
from ..model.sharded_head import whole_state
from ..model.sync_batch_norm import convert_sync_batch_norm
from ..trained import describe
from . import epoch_evaluation
from .checkpoint import load_trainer_state, trainer_state
from .cuda_graph import GraphedSteps, graphed_steps
from .divergence import Diverged, check_weights
from .input import make_batches, with_evaluation_data_on
from .kept_weights import BestEpoch, end_stage, weight_average
from .optim import clip_gradients, lr_schedule, make_optimizer
from .progress import throughput
from .sharding import data_parallel, head_maker
from .stopping import Stopped, stop_requested, training
from .training_model import CompiledFeatures, TrainingModel

if TYPE_CHECKING:
    from .first_stages import FirstStages
    from .progress import Display
    from .run_folder import Record, RunFolder

T = TypeVar("T")
HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains one model with one method: `fit` is the training loop, `step` takes one step.

    Its state is everything that a checkpoint holds; see checkpoint.py.

    Args:
        name: the name of the method.
        config: the options.
        data: the dataset.
    """

    training_model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(self, name: str, config: Config, data: Dataset) -> None:
        self.name, self.config = name, config
        self.device = torch.device(config.runtime.resolved_device)
        if self.device.type == "cuda" and self.device.index is None:
            # The index is needed because the current GPU is a property of each thread.
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Each method starts from the seed, so that its weights do not depend on the methods before it.
        torch.manual_seed(config.run.seed)
        self.method = METHODS[name](config, data.train_counts.to(self.device))
        self.model = build_model(
            data,
            head_maker(self.method, config, self.device),
            backbone_name=config.model.backbone,
            pretrained=config.model.weights,
            center_features=config.model.center_features,
            crop_size=config.augment.crop_size,
            tune=config.tuning.tune,
            lora_rank=config.tuning.lora_rank,
        ).to(self.device)
        self.data = with_evaluation_data_on(self.device, data)
        if distributed.is_initialized():
            convert_sync_batch_norm(self.model, self.device)
        if rank := distributed.rank():
            # For dropout; the weights are those of rank 0. The CPU's generator reads the low 32 bits of a seed only.
            torch.manual_seed(config.run.seed + 1_000_003 * rank)
        self.batches = make_batches(config, data, self.method.stages[0], 0, self.device)
        self.features: Callable[[Tensor], Tensor] = self.model.features
        if config.runtime.compile:
            self.features = CompiledFeatures(self.model, self.batches.micro_batch_sizes())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.runtime.precision == "fp16")
        self.stage_data = StageData(self.training_features, self.validation_features)
        self.images = 0  # image passes so far
        self.average: AveragedModel | None = None  # of the weights in this stage
        self.best: BestEpoch | None = None  # of this stage
        self.input_seconds = 0.0  # time spent waiting for input in this epoch
        self.begin_stage(0)

    def fit(self, folder: RunFolder, first_stages: FirstStages, display: Display) -> None:
        """Train the remaining stages; write records, checkpoints, the model and the result to the run's folder.

        Raises:
            Diverged: the loss or a weight is not finite.
            Stopped: a signal has arrived; the checkpoint is written.
        """
        with training():
            self._fit(folder, first_stages, display)

    def _fit(self, folder: RunFolder, first_stages: FirstStages, display: Display) -> None:
        while self.stage < len(self.method.stages):
            while not self._is_stage_over():
                title, start, images = self._epoch_title(), time.perf_counter(), self.images
                while self.step_of_epoch < self.steps_per_epoch:
                    num_images = sum(self.batches.sizes[self.step_of_epoch])
                    loss = self.step()
                    display.step(title, num_images, self._loss_to_show(loss, display))
                    if self._is_checkpoint_step():
                        folder.save_checkpoint(self)
                    self._stop_if_requested(folder)
                self.synchronize()
                speed = throughput(self.images - images, time.perf_counter() - start, self.input_seconds)
                record = self.end_epoch() | speed
                record |= self.evaluate() if self._is_evaluation_epoch() else self.slot_usage()
                if self.best is not None and "mean_of_classes" in record:
                    record |= self.best.update(self, record)
                folder.append_record(record)
                folder.save_checkpoint(self, min_seconds=self.config.run.checkpoint_seconds)
                display.epoch(title, record)
                self._stop_if_requested(folder)
            epochs_left = self.method.stages[self.stage].epochs - self.epoch
            display.skip(epochs_left * sum(map(sum, self.batches.sizes)))
            if self.stage == 0:
                first_stages.save(self, folder.records)
            self._stop_if_requested(
                folder
            )  # before the method changes the model, so that a resumed run repeats it
            self.begin_stage(self.stage + 1)
        model_file = f"model-{self.name}.safetensors"
        details = describe(self.name, self.config, self.data)
        state = whole_state(self.model)
        folder.write(
            model_file, lambda path: save_model(path, self.model, self.data.class_names, details, state)
        )
        folder.append_record(self._result())
        folder.save_checkpoint(self)

    @property
    def evaluated_model(self) -> Model:
        """The model that is evaluated: the average of the weights with --ema-decay, else the model in training."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, Model)
        return model

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch of this stage."""
        return len(self.batches.sizes)

    def step(self) -> Tensor:
        """Take one step on the next mini-batch of both streams; return this process's estimate of the loss."""
        size = self.batches.sizes[self.step_of_epoch]
        if self.graphed:
            loss = self.graphed.step(self._wait_for(self.batches.next_draws), size)
        else:
            loss = self.optimize(self._wait_for(self.batches.next))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.images += sum(size)
        self.step_of_epoch += 1
        return loss

    def optimize(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Compute the gradients of all micro-batches and update the weights; return the loss.

        The host does not wait for the GPU here, so that a CUDA graph can capture it.
        """
        self.optimizer.zero_grad()
        total: Tensor | float = 0.0
        for i, batch in enumerate(micro_batches):
            with self._gradient_sync(last=i == len(micro_batches) - 1):
                with self._autocast():
                    losses = self.training_model(
                        batch.x, batch.y, batch.num_balanced, batch.transfer_uniforms, batch.mixed
                    )
                losses = {name: batch.loss_weights[name] * loss for name, loss in losses.items()}
                weighted = [self.method.loss_coefficients[name] * loss for name, loss in losses.items()]
                loss = torch.stack(weighted).sum()
                # DistributedDataParallel averages gradients over processes, but each loss is a part of the sum.
                self.scaler.scale(loss * distributed.world_size()).backward()
            self._accumulate_loss_sums(losses, loss)
            total = total + loss.detach()
        clip_gradients(self.optimizer, self.scaler, self.config.optim.clip_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert isinstance(total, Tensor)
        return total * distributed.world_size()

    def begin_stage(self, stage: int) -> None:
        """Keep the weights, let the method change the head, and start with a new optimizer and schedule."""
        config = self.config
        end_stage(self)
        self.stage, self.epoch, self.step_of_epoch, self.lr = stage, 0, 0, config.optim.lr
        self.loss_sums: dict[str, Tensor] = {}  # sums over the steps of this epoch
        self.graphed: GraphedSteps | None = None  # frees the memory of the previous stage's graph
        stages = self.method.stages
        if stage == len(stages):
            self.method.finish(self.model, self.stage_data)
            return
        if stage and not stages[stage].same_samples(stages[stage - 1]):
            self.batches = make_batches(config, self.data, stages[stage], stage, self.device)
        self.method.begin_stage(stage, self.model, self.stage_data)
        self.model.train()
        self.model.freeze_features(stages[stage].frozen_features)
        self.training_model = TrainingModel(
            self.model,
            self.method,
            self.features,
            split_batch_norm=config.model.batch_norm == "split",
            shared_streams=stages[stage].streams == "shared",
        )
        self.training_model = data_parallel(self.training_model)
        self.optimizer = make_optimizer(self.model, config, self.method.parameters_without_decay)
        factor = lr_schedule(config.optim, stages[stage], self.steps_per_epoch)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = weight_average(self.model, config.optim.ema_decay)
        self.best = BestEpoch() if config.optim.keep == "best" else None
        self.graphed = graphed_steps(self)
        self.method.begin_epoch(stage, 0, self.model)

    def end_epoch(self) -> Record:
        """Move to the next epoch and return the record of the finished one, with its mean losses."""
        names = sorted(self.loss_sums)
        sums = distributed.all_reduce_sum(torch.stack([self.loss_sums[name] for name in names]))
        means = dict(zip(names, (sums / self.step_of_epoch).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']}")
        check_weights(self.model)  # the last step changes them after its loss
        self.method.end_epoch(self.model, self.stage_data)
        for total in self.loss_sums.values():
            total.zero_()
        self.epoch, self.step_of_epoch, self.input_seconds = self.epoch + 1, 0, 0.0
        self.method.begin_epoch(self.stage, self.epoch, self.model)
        record = {"event": "epoch", "method": self.name, "stage": self.stage + 1, "epoch": self.epoch}
        return record | {"images": self.images, "lr": self.lr} | means | self.method.describe(self.model.head)

    def evaluate(self, final: bool = False) -> Record:
        """Evaluate on the validation split; on the test split if there is none, or if `final`. Return the accuracies."""
        return epoch_evaluation.evaluate(self, final)

    def slot_usage(self) -> Record:
        """Return the slot usage on about a thousand evaluation samples, for epochs without an evaluation."""
        return epoch_evaluation.slot_usage(self)

    @torch.no_grad()
    def training_features(self) -> tuple[Tensor, Tensor]:
        """Return the features of all training samples, without augmentation, and their classes."""
        return self._features_of(self.batches.x), self.batches.y

    @torch.no_grad()
    def validation_features(self) -> tuple[Tensor, Tensor] | None:
        """Return the features of the validation samples and their classes; None without a validation split."""
        if self.data.x_val is None or self.data.y_val is None:
            return None
        return self._features_of(self.data.x_val), self.data.y_val.to(self.device)

    def _features_of(self, samples: Tensor) -> Tensor:
        self.model.eval()
        features = torch.cat([self.model.features(x.to(self.device)) for x in samples.split(500)])
        self.model.train()
        return features

    def synchronize(self) -> None:
        """Wait until the GPU has finished all work, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, Any]:
        return trainer_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trainer_state(self, state)
        if self.stage < len(self.method.stages):
            self.method.begin_epoch(self.stage, self.epoch, self.model)
        if self.graphed:
            self.graphed = GraphedSteps(self)  # a graph would keep adding to the old loss sums

    def _result(self) -> Record:
        data, run = self.data, self.config.run
        record = {"event": "result", "method": self.name, "images": self.images}
        record |= self.method.describe(self.model.head) | self.evaluate(final=True)
        return record | {"analysis": analyze(self.model, data, run.split_rule, run.seed)}

    def _epoch_title(self) -> str:
        stage = self.method.stages[self.stage]
        return f"{self.name} {stage.name}".strip() + f" epoch {self.epoch + 1}/{stage.epochs}"

    def _loss_to_show(self, loss: Tensor, display: Display) -> float | None:
        """Return the loss if it is shown. On a GPU reading it waits for the step, so it is read every 20 steps."""
        due = self.device.type == "cpu" or self.step_of_epoch % 20 == 0
        return loss.item() if due and display.shows_steps else None

    def _is_checkpoint_step(self) -> bool:
        every = self.config.run.checkpoint_steps
        return every is not None and self.step_of_epoch % every == 0

    def _is_stage_over(self) -> bool:
        patience = self.config.optim.patience
        stops = self.best is not None and patience is not None and self.best.worse >= patience
        return stops or self.epoch >= self.method.stages[self.stage].epochs

    def _is_evaluation_epoch(self) -> bool:
        is_last = self.epoch == self.method.stages[self.stage].epochs
        return is_last or self.epoch % self.config.run.evaluate_every == 0

    def _stop_if_requested(self, folder: RunFolder) -> None:
        if number := stop_requested():
            folder.save_checkpoint(self)
            distributed.broadcast_from_rank0(
                lambda: None
            )  # torchrun ends all processes when the first one ends
            raise Stopped(number, f" in {self.name}, after {self.images:,} images")

    def _wait_for(self, load: Callable[[], T]) -> T:
        start = time.perf_counter()
        loaded = load()
        self.input_seconds += time.perf_counter() - start
        return loaded

    def _autocast(self) -> torch.autocast:
        precision = self.config.runtime.precision
        return torch.autocast(self.device.type, HALF_PRECISION.get(precision), precision in HALF_PRECISION)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which backward all-reduces the gradients only with the last micro-batch."""
        if last or not isinstance(self.training_model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: AbstractContextManager[None] = self.training_model.no_sync()
        return no_sync

    def _accumulate_loss_sums(self, losses: dict[str, Tensor], loss: Tensor) -> None:
        """Add to the epoch's sums in place, so that a CUDA graph finds them."""
        for name, value in {**(losses if len(losses) > 1 else {}), "loss": loss}.items():
            if name not in self.loss_sums:
                self.loss_sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self.loss_sums[name] += value.detach()
