"""One model on its way through the stages of its method."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gistops.sampling import ClassBalancedBatchSampler

from .. import distributed
from ..config import Config
from ..data.dataset import Dataset
from ..data.stream.augment import Augmentation
from ..data.stream.batches import Batches, MicroBatch, step_sizes
from ..data.stream.streams import BalancedStream, RandomStream
from ..evaluation.evaluate import evaluate
from ..methods import METHODS
from ..model.model import build_model
from ..model.sync_batch_norm import normalize_over_processes
from .cuda_graph import GraphedSteps
from .losses import CompiledFeatures, Losses
from .optim import lr_schedule, parameter_groups

Record = dict[str, Any]
POSITION = ("stage", "epoch", "step_of_epoch", "images", "lr")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Training:
    """Weights, optimiser, streams and position: all that a checkpoint must hold, and the step."""

    def __init__(self, name: str, config: Config, data: Dataset) -> None:
        self.name, self.config, self.data = name, config, data
        self.device = torch.device(config.runtime.device)
        if self.device.type == "cuda" and self.device.index is None:
            # Said in full, as threads have a current GPU of their own.
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Each method starts from the seed, so that its weights do not depend on what was trained before it.
        torch.manual_seed(config.run.seed)
        self.method = METHODS[name](config, data.train_counts.to(self.device))
        self.model = build_model(data, config, self.method.head).to(self.device)
        self.data = watched_on(data, self.device)
        if distributed.is_initialized():
            normalize_over_processes(self.model, self.device)
        if rank := distributed.rank():
            torch.manual_seed(
                config.run.seed + (rank << 32)
            )  # dropout of its own; weights are the first one's
        self.batches = self._make_batches()
        self.features: Callable[[Tensor], Tensor] = self.model.features
        if config.runtime.compile:
            self.features = CompiledFeatures(self.model, self.batches.micro_batch_sizes())
        self.steps_per_epoch = len(self.batches.sizes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.runtime.precision == "fp16")
        self.images = 0
        self.waited = 0.0  # seconds for the input, in this epoch
        self.begin_stage(0)

    def _make_batches(self) -> Batches:
        config, data = self.config, self.data
        generator = torch.Generator().manual_seed(config.run.seed)  # of the data's order and augmentation
        sizes = sizes_of(config, data)
        return Batches(
            placed(data.x_train, self.device),
            data.y_train.to(self.device),
            RandomStream(len(data.y_train), generator),
            BalancedStream(
                ClassBalancedBatchSampler(
                    data.y_train,
                    config.method.classes_per_batch,
                    config.method.samples_per_class,
                    seed=config.run.seed,
                )
            ),
            [self.method.draws(num_balanced, num_random) for num_balanced, num_random in sizes],
            Augmentation(
                config.augment.crop_padding,
                config.augment.flip,
                config.augment.crop_size or 0,
                config.augment.crop_scale,
                config.augment.color_jitter,
            ),
            generator,
            torch.Generator().manual_seed(-1 - config.run.seed),
            own_parts(config),
            ahead=self.device.type != "cpu",  # where the CPU has nothing else to do
        )

    def begin_stage(self, stage: int) -> None:
        """Keep the weights, change the head as the stage asks; optimiser and schedule start afresh."""
        self.stage, self.epoch, self.step_of_epoch, self.lr = stage, 0, 0, self.config.optim.lr
        self.sums: dict[str, Tensor] = {}  # of the epoch's losses
        self.graphed: GraphedSteps | None = None  # what a stage's held in memory
        if stage == len(self.method.stages):
            return
        self.method.begin_stage(stage, self.model.head, self._sample)
        self.model.train()
        config = self.config
        self.losses: nn.Module = Losses(self.model, self.method, config, self.features)
        if distributed.is_initialized():  # the first one's weights become those of all
            self.losses = nn.parallel.DistributedDataParallel(self.losses)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            # One pass over memory: a seventh of the time, for a head of 8,142 × 2,048 on a CPU. But where a
            # scaler leaves out the first step, torch's CPU kernel goes on with a momentum that nobody wrote.
            fused=config.runtime.precision != "fp16",
        )
        self.graphed = GraphedSteps(self) if self._can_be_graphed() else None
        factor = lr_schedule(self.config, self.method.stages[stage].epochs, self.steps_per_epoch)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self) -> Tensor:
        """One step of SGD on one batch of both streams; returns this process's estimate of the loss."""
        begin, size = time.perf_counter(), self.batches.sizes[self.step_of_epoch]
        if self.graphed:
            drawn = self.batches.next_draws()
            self.waited += time.perf_counter() - begin
            loss = self.graphed.step(drawn, size)
        else:
            parts = self.batches.next()
            self.waited += time.perf_counter() - begin
            loss = self.optimize(parts)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.images += sum(size)
        self.step_of_epoch += 1
        return loss

    def optimize(self, parts: list[MicroBatch]) -> Tensor:
        """Gradients of all parts, and the optimizer's step: on a GPU no more than launches, which a CUDA graph can hold."""
        self.optimizer.zero_grad()
        total = sum(self._backward(part, i == len(parts) - 1) for i, part in enumerate(parts))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert isinstance(total, Tensor)
        return total * distributed.world_size() if distributed.is_initialized() else total

    def _can_be_graphed(self) -> bool:
        """True if steps are to be held in CUDA graphs; says why not where they were asked for and cannot be."""
        if not self.config.runtime.cuda_graph:
            return False
        reasons = {
            f"there are none on {self.device.type}": self.device.type != "cuda",
            "not with several processes": distributed.is_initialized(),
            "the scaler of fp16 looks at every step": self.config.runtime.precision == "fp16",
            "the samples do not fit on the GPU": self.batches.x.device != self.device,
        }
        for reason, holds in reasons.items():
            if holds:
                warnings.warn(
                    f"--cuda-graph: {reason}, so steps are launched kernel by kernel",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
        return True

    def _backward(self, part: MicroBatch, last: bool) -> Tensor:
        """Add a part's share of the gradients, with the last one those of all processes; returns its share of the loss."""
        together = contextlib.nullcontext()
        if distributed.is_initialized() and not last:
            together = self.losses.no_sync()  # type: ignore[operator]
        with together:
            with torch.autocast(
                self.device.type,
                HALF.get(self.config.runtime.precision),
                self.config.runtime.precision in HALF,
            ):
                losses = self.losses(part.x, part.y, part.num_balanced, part.transfer_uniforms)
            shares = {name: part.loss_weights[name] * loss for name, loss in losses.items()}
            loss = torch.stack([self.method.weights[name] * share for name, share in shares.items()]).sum()
            # DistributedDataParallel takes the mean over processes, of which each has a part of the sum.
            self.scaler.scale(loss * distributed.world_size()).backward()
        if len(shares) > 1:
            self._count(shares)
        self._count({"loss": loss})
        return loss.detach()

    def _count(self, losses: dict[str, Tensor]) -> None:
        """Add to the epoch's sums, in place, where a CUDA graph finds them."""
        for name, loss in losses.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self.sums[name] += loss.detach()

    @torch.no_grad()
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Features of all training samples, without augmentation, and their classes."""
        self.model.eval()
        features = torch.cat([self.model.features(x.to(self.device)) for x in self.batches.x.split(500)])
        self.model.train()
        return features, self.batches.y

    def wait(self) -> None:
        """Until what was launched is done, so that a clock that is read then tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def end_epoch(self) -> Record:
        """Go to the next epoch; returns the record of the one that ends, with its mean losses."""
        names = sorted(self.sums)
        sums = (
            distributed.all_reduce_sum(torch.stack([self.sums[name] for name in names])) / self.step_of_epoch
        )
        means = dict(zip(names, sums.tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']}; a lower --lr or a longer --warmup-epochs may help")
        self.method.end_epoch(self.model.head, self._sample)
        for total in self.sums.values():
            total.zero_()
        self.epoch, self.step_of_epoch, self.waited = self.epoch + 1, 0, 0.0
        record = {"event": "epoch", "method": self.name, "stage": self.stage + 1, "epoch": self.epoch}
        return record | {"images": self.images, "lr": self.lr} | means | self.method.describe(self.model.head)

    def evaluate(self, final: bool = False) -> Record:
        """Accuracies on the validation samples, or the test samples where there are none; at the end on the test samples."""
        data, rule = self.data, self.config.run.split_rule
        split, x, y = ("test", data.x_test, data.y_test) if final else data.eval_split
        found, readings = evaluate(self.model, x, y, data.num_classes, self.method.readings)
        record: Record = {"split": split, "accuracy": found.accuracy(data.train_counts, rule)}
        if readings:
            record["accuracy_of"] = {
                name: e.accuracy(data.train_counts, rule) for name, e in readings.items()
            }
        if found.slot_usage is not None:
            record["slot_usage"] = found.slot_usage.tolist()
        if final:
            record |= {"accuracy_per_class": found.per_class(), "train_counts": data.train_counts.tolist()}
        return record

    def slot_usage(self) -> Record:
        """Which slots win, on about a thousand of the watched samples: for epochs that are not evaluated."""
        if not getattr(self.model.head, "num_displacements", 0):
            return {}
        _, x, y = self.data.eval_split
        every = max(1, len(y) // 1000)
        found, _ = evaluate(self.model, x[::every], y[::every], self.data.num_classes)
        return {} if found.slot_usage is None else {"slot_usage": found.slot_usage.tolist()}

    def state_dict(self) -> Record:
        """All that the steps to come depend on, in plain types and tensors; the same in all processes."""
        return {
            "name": self.name,
            "position": {name: getattr(self, name) for name in POSITION},
            "sums": {name: distributed.all_reduce_sum(total.clone()) for name, total in self.sums.items()},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "torch_rng": distributed.all_gather(torch.get_rng_state()),
            "cuda_rng": distributed.all_gather(torch.cuda.get_rng_state(self.device))
            if self.device.type == "cuda"
            else [],
        }

    def load_state_dict(self, state: Record) -> None:
        """Go back to where `state_dict` was called, also with another number of processes.

        With as many processes as before, all random numbers are as they would have been.
        """
        for stage in range(1, state["position"]["stage"] + 1):
            self.begin_stage(stage)  # so that parameters and optimiser are those of the saved stage
        if self.graphed:
            self.graphed = GraphedSteps(self)  # the sums, which a graph holds, are others
        for name in POSITION:
            setattr(self, name, state["position"][name])
        first = distributed.rank() == 0  # the sums are over all processes
        self.sums = {name: total.to(self.device) * first for name, total in state["sums"].items()}
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        rank = distributed.rank()
        if rank < len(state["torch_rng"]):
            torch.set_rng_state(state["torch_rng"][rank])
        if rank < len(state["cuda_rng"]):
            torch.cuda.set_rng_state(state["cuda_rng"][rank], self.device)


def placed(x: Tensor, device: torch.device, most: float = 0.5) -> Tensor:
    """`x` on the device if it takes no more than so much of what is free there; otherwise where it is."""
    if device.type != "cuda":
        return x
    gc.collect()
    torch.cuda.empty_cache()  # what the method before left in torch's hands is free
    if x.nbytes > most * torch.cuda.mem_get_info(device)[0]:
        return x
    return x.to(device)


def watched_on(data: Dataset, device: torch.device) -> Dataset:
    """The data, with samples that are evaluated again and again on the device if they are small beside it."""
    x_val = None if data.x_val is None else placed(data.x_val, device, 1 / 16)
    return dataclasses.replace(data, x_test=placed(data.x_test, device, 1 / 16), x_val=x_val)


def own_parts(config: Config) -> tuple[range, int]:
    """Of the parts that a step is divided into, those of this process, and how many there are."""
    each, rank = config.optim.accumulate, distributed.rank()
    return range(rank * each, (rank + 1) * each), each * distributed.world_size()


def sizes_of(config: Config, data: Dataset) -> list[tuple[int, int]]:
    """For each step of an epoch, the samples of the balanced and of the random stream."""
    balanced = config.method.classes_per_batch * config.method.samples_per_class
    # Batch normalisation needs two samples at least.
    least = own_parts(config)[1] * (2 if config.model.batch_norm == "split" else 1)
    return step_sizes(
        len(data.y_train), config.method.batch_size, balanced, config.optim.max_steps_per_epoch, least
    )
