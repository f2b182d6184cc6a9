"""The input of training: the sizes of steps, the batches, and the device that holds the samples."""

from __future__ import annotations

import dataclasses
import gc
import math

import torch
from torch import Tensor

from gistops.sampling import ClassBalancedBatchSampler

from .. import distributed
from ..config import Config
from ..data.dataset import Dataset
from ..data.stream.augment import Augmentation
from ..data.stream.auto_augment import AutoAugment
from ..data.stream.batches import Batches, step_sizes
from ..data.stream.mixing import Mixing
from ..data.stream.streams import BalancedStream, RandomStream
from ..methods import METHODS
from ..methods.method import Stage


def make_batches(config: Config, data: Dataset, stage: Stage, number: int, device: torch.device) -> Batches:
    """Return the batches of a stage from the start of their random streams.

    Args:
        config: the options.
        data: the dataset.
        stage: the stage.
        number: the number of the stage, from 0. The stages of a method that do not continue each other's streams have
            other random numbers.
        device: the device of the labels and, if they fit, of the samples.
    """
    seed = config.run.seed + 1_000_003 * number
    generator = torch.Generator().manual_seed(seed)  # for the order and augmentation of samples
    subset = samples_of(stage, data)
    labels = data.y_train if subset is None else data.y_train[subset]
    classes, samples = config.method.balanced_sizes(data.num_classes)
    sampler = ClassBalancedBatchSampler(
        labels,
        classes if subset is None else min(classes, len(labels.unique())),
        samples,
        seed=seed,
        num_replicas=1,  # all processes draw the batches of one sequence, and each takes its part of a batch
    )
    augment = config.augment
    return Batches(
        to_device_if_it_fits(data.x_train, device),
        data.y_train.to(device),
        RandomStream(len(labels), generator),
        BalancedStream(sampler),
        stage_step_sizes(config, data, stage),
        Augmentation(
            augment.crop_padding,
            augment.flip,
            augment.crop_size or 0,
            augment.crop_scale,
            augment.color_jitter,
            None if augment.auto_augment == "none" else AutoAugment(augment.auto_augment),
        ),
        generator,
        torch.Generator().manual_seed(2**64 - 1 - seed),
        local_micro_batches(config),
        ahead=device.type != "cpu",  # on the CPU, preparing batches would compete with training
        subset=subset,
        mixing=Mixing(augment.mixup, augment.cutmix),
    )


def samples_of(stage: Stage, data: Dataset) -> Tensor | None:
    """Return the indices of the training samples that a stage uses; None for all samples."""
    return None if stage.classes is None else stage.classes.cpu()[data.y_train].nonzero().flatten()


def stage_step_sizes(config: Config, data: Dataset, stage: Stage) -> list[tuple[int, int]]:
    """Return the numbers of samples from the balanced and the random stream in each step of an epoch of a stage."""
    subset = samples_of(stage, data)
    num_samples = len(data.y_train) if subset is None else len(subset)
    return [stage.split(*sizes) for sizes in epoch_step_sizes(config, data, num_samples)]


def image_passes(config: Config, data: Dataset, method: str) -> int:
    """Return the number of image passes of all stages of a method."""
    stages = METHODS[method](config, data.train_counts).stages
    return sum(stage.epochs * sum(map(sum, stage_step_sizes(config, data, stage))) for stage in stages)


def epoch_step_sizes(config: Config, data: Dataset, num_samples: int | None = None) -> list[tuple[int, int]]:
    """Return the numbers of balanced and random samples in each step of an epoch that has both streams.

    Args:
        config: the options.
        data: the dataset.
        num_samples: the number of training samples that are used; all if None.
    """
    balanced = math.prod(config.method.balanced_sizes(data.num_classes))
    # Batch normalization needs at least two samples.
    least = local_micro_batches(config)[1] * (2 if config.model.batch_norm == "split" else 1)
    total = len(data.y_train) if num_samples is None else num_samples
    return step_sizes(total, config.method.batch_size, balanced, config.optim.max_steps_per_epoch, least)


def smallest_part(config: Config, data: Dataset, method: str) -> int:
    """Return the smallest number of samples that go through the network together in training, in one process."""
    parts = local_micro_batches(config)[1]
    stages = METHODS[method](config, data.train_counts).stages
    streams = {sizes for stage in stages if stage.epochs for sizes in stage_step_sizes(config, data, stage)}
    samples = {(balanced // parts, random // parts) for balanced, random in streams}
    if config.model.batch_norm == "split":
        return min((stream for sizes in samples for stream in sizes if stream), default=0)
    return min(map(sum, samples), default=0)


def local_micro_batches(config: Config) -> tuple[range, int]:
    """Return the indices of this process's micro-batches, and the number of all micro-batches of a step."""
    accumulate, rank = config.optim.accumulate, distributed.rank()
    return range(rank * accumulate, (rank + 1) * accumulate), accumulate * distributed.world_size()


def to_device_if_it_fits(x: Tensor, device: torch.device, max_fraction: float = 0.5) -> Tensor:
    """Return `x` on a GPU if it takes at most `max_fraction` of the GPU's free memory, otherwise `x` itself."""
    if device.type != "cuda":
        return x
    gc.collect()
    torch.cuda.empty_cache()  # memory that the previous method left in torch's cache is free
    if x.nbytes > max_fraction * torch.cuda.mem_get_info(device)[0]:
        return x
    return x.to(device)


def with_evaluation_data_on(device: torch.device, data: Dataset) -> Dataset:
    """Return the dataset with validation and test samples on the device, if they are small."""
    x_val = None if data.x_val is None else to_device_if_it_fits(data.x_val, device, 1 / 16)
    return dataclasses.replace(data, x_test=to_device_if_it_fits(data.x_test, device, 1 / 16), x_val=x_val)
