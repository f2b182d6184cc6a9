"""The checks of a run's options against its data. `run` raises the first problem before it trains; `doctor` lists all."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from . import distributed
from .config import Config, ConfigError
from .console import counted
from .data.dataset import Dataset
from .data.stream.auto_augment import AutoAugment
from .files import check_writable, existing_folder
from .footprint import disk_available, disk_needed, fixed_memory, memory_available, memory_needed, try_network
from .methods import METHODS
from .methods.lifted import structure_loss
from .methods.residual_directions import num_residuals
from .methods.two_stage import TwoStageMethod
from .model.backbones import TIMM, BackboneError
from .training.input import local_micro_batches, smallest_part
from .training.optim import warmup_epochs


def fill_in(config: Config, data: Dataset) -> Config:
    """Return the options with those that were not given and depend on the data."""
    classes, samples = config.method.balanced_sizes(data.num_classes)
    return config.replace(classes_per_batch=classes, samples_per_class=samples)


class Doubt(ConfigError):
    """An option with which a run may be slow, train worse or run out of memory: the run warns and starts."""


def check_options(config: Config, data: Dataset, shared: bool = False) -> None:
    """Check the options against the data, and warn of doubtful ones. shared: as in `FirstStages`.

    Raises:
        ConfigError: the first option that does not fit the data, this machine or the number of processes.
    """
    for problem in problems_of(config, data, shared):
        if not isinstance(problem, Doubt):
            raise problem
        warnings.warn(str(problem), RuntimeWarning, stacklevel=2)


def problems_of(config: Config, data: Dataset, shared: bool = False) -> Iterator[ConfigError]:
    """Yield an error for every option that does not fit the data, this machine or the number of processes."""
    usable = True
    for check in (
        _packages,
        _auto_augment,
        _folder,
        _backbone,
        _tuning,
        _validation,
        _label_smoothing,
        _mixing,
        _crop,
        _classes,
        _devices,
        _micro_batches,
        _directions,
        _warm_up,
        _precision,
        _sharding,
    ):
        found = list(check(config, data))
        yield from found
        usable &= all(isinstance(problem, Doubt) for problem in found)
    if usable:  # otherwise the trial would fail for the same reasons
        yield from _network(config, data, shared)


def _auto_augment(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that --auto-augment has its package and images that it can change."""
    policy = config.augment.auto_augment
    if policy == "none":
        return
    if not data.is_images or data.sample_shape[0] not in (1, 3):
        yield ConfigError(
            "auto_augment", f"none for samples {data.sample_shape}, not gray or color images", policy
        )
    if config.runtime.cuda_graph:
        yield ConfigError(
            "cuda_graph", "off with --auto-augment, whose work differs from image to image", True
        )
    try:
        AutoAugment(policy)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        expected = "torchvision for this torch, which `pip install '.[augment]'` installs"
        yield ConfigError("auto_augment", expected, error)


def _packages(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that the packages are installed that methods need."""
    if "lifted" not in config.method.methods:
        return
    try:
        structure_loss()
    except ImportError as error:
        expected = "pytorch-metric-learning for lifted, which `pip install '.[baselines]'` installs"
        yield ConfigError("methods", expected, error)


def _folder(config: Config, data: Dataset) -> Iterator[ConfigError]:
    try:
        check_writable(existing_folder(Path(config.run.runs)))
    except OSError as error:
        yield ConfigError("runs", "a writable folder", f"{error.filename} ({error.strerror})")


def _backbone(config: Config, data: Dataset) -> Iterator[ConfigError]:
    if data.is_images != (config.model.backbone != "none"):
        kind = "a network, for images" if data.is_images else "none (--recipe features), for features"
        expected = f"{kind} {data.sample_shape} in {config.data.data}"
        yield ConfigError("backbone", expected, repr(config.model.backbone))


def _tuning(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that the methods and the backbone fit --tune and --layer-decay; the trial of the network checks its layers."""
    backbone, tune = config.model.backbone, config.tuning.tune
    if tune != "all" and backbone == "none":
        yield ConfigError("tune", "all without a backbone", repr(tune))
    if tune == "lora" and "lfme" in config.method.methods:
        yield ConfigError(
            "methods", "methods other than lfme, which trains several networks, with --tune lora", "lfme"
        )
    if config.tuning.layer_decay is not None and not backbone.startswith(TIMM):
        yield ConfigError("layer_decay", f"a backbone {TIMM}NAME, whose layers timm orders", repr(backbone))


def _validation(config: Config, data: Dataset) -> Iterator[ConfigError]:
    if config.optim.keep == "best" and data.y_val is None:
        yield ConfigError("keep", "last without a validation split, which --hold-out-val 0.1 makes", "'best'")


def _label_smoothing(config: Config, data: Dataset) -> Iterator[ConfigError]:
    if config.method.label_smoothing:
        yield from _methods_with(config, data, "smooths_labels", "--label-smoothing")


def _mixing(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that the methods and the samples fit --mixup and --cutmix."""
    augment = config.augment
    for name, alpha in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
        if alpha:
            yield from _methods_with(config, data, "mixes_labels", f"--{name}")
    if augment.cutmix and not data.is_images:
        yield ConfigError("cutmix", "0 for features, which --mixup can mix", augment.cutmix)


def _methods_with(config: Config, data: Dataset, ability: str, option: str) -> Iterator[ConfigError]:
    """Check that all methods of the run have an ability, an attribute of `Method`, that an option needs."""
    fits = {name: getattr(make(config, data.train_counts), ability) for name, make in METHODS.items()}
    if others := [name for name in config.method.methods if not fits[name]]:
        expected = f"{', '.join(name for name in fits if fits[name])} with {option}"
        yield ConfigError("methods", expected, ", ".join(others))


def _crop(config: Config, data: Dataset) -> Iterator[ConfigError]:
    crop = config.augment.crop_size
    if crop and data.is_images and crop > min(data.sample_shape[1:]):
        yield ConfigError("crop_size", f"at most the images' side, {min(data.sample_shape[1:])}", crop)


def _classes(config: Config, data: Dataset) -> Iterator[ConfigError]:
    classes, _ = config.method.balanced_sizes(data.num_classes)
    if classes > data.num_classes:
        expected = f"at most {data.num_classes}, the classes in {config.data.data}"
        yield ConfigError("classes_per_batch", expected, classes)


def _devices(config: Config, data: Dataset) -> Iterator[ConfigError]:
    device = config.runtime.resolved_device
    if not distributed.is_initialized() or not device.startswith("cuda"):
        return
    if device != "cuda":
        yield ConfigError("device", "cuda or auto, as each process takes its own GPU", repr(device))
    # Scripts of schedulers may leave LOCAL_WORLD_SIZE out. NCCL then refuses two processes on one GPU.
    elif (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > torch.cuda.device_count():
        available = f"{counted(torch.cuda.device_count(), 'GPU')} for {local} processes"
        yield ConfigError("device", "a GPU per process of this machine", available)


def _micro_batches(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that each micro-batch of each process has samples of both streams."""
    parts = local_micro_batches(config)[1]
    balanced = math.prod(config.method.balanced_sizes(data.num_classes))
    for option, samples in (
        ("batch_size", min(config.method.batch_size, len(data.y_train))),
        ("classes_per_batch", balanced),
    ):
        if samples < parts:
            expected = f"at least {parts}, a sample per process and micro-batch ({distributed.world_size()} × {config.optim.accumulate})"
            yield ConfigError(option, expected, samples)


def _directions(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that the larger classes have a sample for each residual direction, which is the least for the clustering."""
    most = num_residuals(data.train_counts)
    for name in config.method.methods:
        method = METHODS[name](config, data.train_counts)
        if isinstance(method, TwoStageMethod) and method.num_directions() > most:
            option, got = "num_displacements", method.num_displacements
            if method.transfers_features and config.displacements.transfer_directions > most:
                option, got = "transfer_directions", config.displacements.transfer_directions
            expected = f"at most {most}, the training samples of the classes with more than the mean number"
            yield ConfigError(option, expected, f"{got} for {name}")
            return


def _warm_up(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Doubt a warm-up that is longer than a stage: a recipe's, in a trial of a few epochs."""
    for name in config.method.methods:
        for stage in METHODS[name](config, data.train_counts).stages:
            if 0 < stage.epochs < warmup_epochs(config.optim, stage):
                of = f"{stage.name} of {name}" if stage.name else name
                expected = f"at most {stage.epochs}, the epochs of {of}, which otherwise does not reach --lr"
                yield Doubt("warmup_epochs", expected, f"{config.optim.warmup_epochs:g}")
                return


def _precision(config: Config, data: Dataset) -> Iterator[ConfigError]:
    if config.runtime.precision == "fp16" and config.runtime.resolved_device == "cpu":
        yield Doubt("precision", "float32 or bf16 on a CPU, where fp16 is slower than float32", "'fp16'")


def _sharding(config: Config, data: Dataset) -> Iterator[ConfigError]:
    """Check that the heads can be sharded, whatever the number of processes, as another number may resume the run."""
    if not config.runtime.shard_classes:
        return
    yield from _methods_with(config, data, "shards_classes", "--shard-classes")
    if config.runtime.precision == "fp16":
        # A gradient scaler skips the steps of the processes whose gradients overflow, and classes would go apart.
        yield ConfigError("precision", "float32 or bf16 with --shard-classes", "'fp16'")


def _network(config: Config, data: Dataset, shared: bool) -> Iterator[ConfigError]:
    """Check by a trial that the network takes the samples, and that its training fits into memory and onto the disk."""
    smallest = min(config.method.methods, key=lambda method: smallest_part(config, data, method))
    try:
        # Two samples show what more would show, and a large network takes them in a second.
        trial = try_network(config, data, min(2, max(1, smallest_part(config, data, smallest))))
    except ConfigError as error:
        yield error
        return
    except BackboneError as error:
        yield ConfigError("backbone", str(error), repr(config.model.backbone))
        return
    except Exception as error:  # the type depends on the network
        yield _refused(config, data, smallest, error)
        return
    if (space := disk_needed(config, data, trial, shared)) > (free := disk_available(config)):
        expected = f"about {space:,} bytes free for checkpoints and models"
        yield ConfigError("runs", expected, f"{free:,} in {config.run.runs}")
    device = config.runtime.resolved_device
    needed = {method: memory_needed(method, config, data, trial) for method in config.method.methods}
    largest = max(needed, key=lambda method: needed[method])
    available = memory_available(torch.device(device))
    if available is None or needed[largest] <= available:
        return
    expected = f"about {needed[largest]:,} bytes of free memory on {device} for {largest}"
    if (fixed := fixed_memory(largest, config, data, trial)) > available:
        yield Doubt("methods", f"{expected}, {fixed:,} of them with any --batch-size", f"{available:,}")
    else:
        advice = "a lower --batch-size or a higher --accumulate needs less"
        yield Doubt("batch_size", expected, f"{available:,}; {advice}")


def _refused(config: Config, data: Dataset, method: str, error: Exception) -> ConfigError:
    """Return the error of a network that refused its samples: they are too few for their statistics, or of a wrong size."""
    why = str(error).partition("\n")[0]
    if "more than 1 value per channel" in why:
        samples = smallest_part(config, data, method)
        option = "batch_norm" if config.model.batch_norm == "split" else "batch_size"
        expected = "at least 2 samples in each part of a step, for batch normalization"
        return ConfigError(option, expected, f"{samples} in a part of a step of {method}")
    option = "crop_size" if config.augment.crop_size else "image_size"
    side = config.augment.crop_size or data.sample_shape[1:]
    return ConfigError(option, f"a size that {config.model.backbone} takes", f"{side} ({why})")
