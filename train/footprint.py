"""The memory and the disk space that a run needs, estimated before it starts by a trial of its network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import Config
from .data.dataset import Dataset
from .files import existing_folder
from .methods import METHODS
from .model.backbones import make_backbone
from .training.input import epoch_step_sizes, local_micro_batches
from .training.trainer import HALF_PRECISION


@dataclass(frozen=True)
class Trial:
    """The results of a trial: the number of features, and the bytes of the weights and of one sample's activations."""

    features: int
    weights: int
    activations: int


def try_network(config: Config, data: Dataset, samples: int) -> Trial:
    """Pass random samples through an untrained network in training mode.

    Args:
        config: the options.
        data: the dataset.
        samples: the number of samples, at least 1.

    Raises:
        BackboneError: the backbone is unavailable.
        Exception: the network does not take samples of this size and number. The type depends on the network.
    """
    shape = list(data.sample_shape)
    if data.is_images and config.augment.crop_size:
        shape[1:] = [config.augment.crop_size] * 2
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]):
        backbone: nn.Module = nn.Identity()
        if data.is_images:
            backbone = make_backbone(config.model.backbone, shape[0])
        x = torch.randn(samples, *shape)
        precision = HALF_PRECISION.get(config.runtime.precision)
        on_cpu = config.runtime.resolved_device == "cpu"  # the trial itself always is
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=on_cpu and precision is not None),
        ):
            features = backbone.train()(x)
        if config.model.center_features:
            nn.BatchNorm1d(features.shape[1], affine=False)(features)
    weights = size(backbone)
    activations = max(0, sum(saved.values()) - weights) // samples + x[0].nbytes
    return Trial(features.shape[1], weights, activations)


def size(module: nn.Module) -> int:
    """Return the bytes of the parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def weights_of(method: str, config: Config, data: Dataset, trial: Trial) -> int:
    """Return the bytes of the weights of a network with the head of a method."""
    with torch.device("meta"):
        head = METHODS[method](config, data.train_counts).make_head(trial.features, data.num_classes)
    return trial.weights + size(head)


def teachers_of(method: str, config: Config, data: Dataset, trial: Trial) -> int:
    """Return the bytes of the weights of the further networks that the training of a method holds."""
    classes = METHODS[method](config, data.train_counts).teachers
    return sum(trial.weights + 4 * (trial.features + 1) * count for count in classes)


def memory_needed(method: str, config: Config, data: Dataset, trial: Trial) -> int:
    """Estimate the bytes that the training of a method needs on its device, beside the samples."""
    parts = local_micro_batches(config)[1]
    samples = -(-max(map(sum, epoch_step_sizes(config, data))) // parts)
    scores = 2 * 4 * samples * data.num_classes  # and their gradient
    weights = 3 * weights_of(method, config, data, trial)  # with gradients and momentum
    needed = weights + samples * trial.activations + scores + teachers_of(method, config, data, trial)
    if METHODS[method](config, data.train_counts).reads_training_features():
        needed += 2 * 4 * len(data.y_train) * trial.features  # all training features, concatenated
    return needed


def memory_available(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:  # the limit of a container
        limit, statistics = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8") for name in ("max", "stat")
        )
        used = dict(line.split() for line in statistics.splitlines())["anon"]
        return min(free, int(limit) - int(used))
    except (OSError, ValueError, KeyError):
        return free


def disk_needed(config: Config, data: Dataset, trial: Trial) -> int:
    """Estimate the bytes of a run's files: a checkpoint and its successor, a first stage, and a model per method."""
    weights = {method: weights_of(method, config, data, trial) for method in config.method.methods}
    checkpoints = (2 * own + teachers_of(method, config, data, trial) for method, own in weights.items())
    return 3 * max(checkpoints) + sum(weights.values())  # a checkpoint has the momentum too


def disk_available(config: Config) -> int:
    """Return the bytes that are free for the run's files, those of its folder included, which the run replaces."""
    folder = Path(config.run.runs) / config.run.name
    own = sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) if folder.is_dir() else 0
    return own + shutil.disk_usage(existing_folder(folder)).free
