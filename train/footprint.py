"""The memory and the disk space that a run needs, estimated before it starts by a trial of its network."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import distributed
from .config import Config
from .data.dataset import Dataset
from .files import existing_folder
from .methods import FIRST_STAGES, METHODS
from .model.backbones import make_backbone
from .model.model import TRAINING_ONLY, Model, Normalize
from .model.tuning import UPDATE, add_low_rank_updates, freeze_untuned
from .training.input import epoch_step_sizes, local_micro_batches
from .training.trainer import HALF_PRECISION

MOMENTS = {"sgd": 1, "adamw": 2}  # tensors of the optimizer's state per parameter
PER_CLASS = ("head.centers", "head.random_centers")  # the tensors that --shard-classes divides


@dataclass(frozen=True)
class Trial:
    """The results of a trial.

    Args:
        network: the model without a head, on the meta device: it has sizes, but no values.
        features: the number of features.
        activations: the bytes of one sample's activations.
        values: the number of values of a sample that the network takes.
    """

    network: Model
    features: int
    activations: int
    values: int


@dataclass(frozen=True)
class ModelSize:
    """The bytes of a model in training.

    Args:
        state: its parameters and buffers.
        trained: the parameters that have a gradient and optimizer state.
        saved: the part of the state that is in a model file.
    """

    state: int
    trained: int
    saved: int


def try_network(config: Config, data: Dataset, samples: int) -> Trial:
    """Pass random samples through an untrained network in training mode.

    Args:
        config: the options.
        data: the dataset.
        samples: the number of samples, at least 1.

    Raises:
        BackboneError: the backbone is unavailable.
        ConfigError: the backbone does not have what --tune names.
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
        normalize: nn.Module = nn.Identity()
        backbone: nn.Module = nn.Identity()
        if data.is_images:
            normalize = Normalize(*torch.zeros(2, shape[0]))
            backbone = make_backbone(config.model.backbone, shape[0])
            if config.tuning.tune == "lora":
                add_low_rank_updates(backbone, config.tuning.lora_rank)
            freeze_untuned(backbone, config.tuning.tune)
        x = torch.randn(samples, *shape)
        precision = HALF_PRECISION.get(config.runtime.precision)
        on_cpu = config.runtime.resolved_device == "cpu"  # the trial itself always is
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=on_cpu and precision is not None),
        ):
            features = backbone.train()(x)
        center: nn.Module = nn.Identity()
        if config.model.center_features:
            center = nn.BatchNorm1d(features.shape[1], affine=False)
            center(features)
    for parameter in backbone.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    activations = sum(saved.values()) // samples
    network = Model(normalize, backbone, center, nn.Identity(), config.model.backbone)
    network.tune = config.tuning.tune
    return Trial(network.to("meta"), features.shape[1], activations, x[0].numel())


def model_sizes(
    name: str, config: Config, data: Dataset, trial: Trial, shards: int = 1
) -> tuple[ModelSize, ModelSize]:
    """Return the sizes of the model in the first and in the last stage of a method, one of which is the largest.

    Args:
        name: the name of the method.
        config: the options.
        data: the dataset.
        trial: the results of the trial.
        shards: the number of processes that share the classes of the head; the sizes are those of one process.
    """
    method = METHODS[name](config, data.train_counts)
    model = copy.deepcopy(trial.network)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model.head = method.make_head(trial.features, data.num_classes)
        model.freeze_features(method.stages[0].frozen_features)
        first = _size(model, shards)
        method.restructure(model)
    model.freeze_features(method.stages[-1].frozen_features)
    return first, _size(model, shards)


def _size(model: Model, shards: int) -> ModelSize:
    def part(name: str, tensor: Tensor) -> int:
        return tensor[: -(-len(tensor) // shards)].nbytes if name in PER_CLASS else tensor.nbytes

    state = {name: part(name, tensor) for name, tensor in model.state_dict().items()}
    trained = sum(part(name, x) for name, x in model.named_parameters() if x.requires_grad)
    saved = sum(
        size for name, size in state.items() if not name.startswith(TRAINING_ONLY) and UPDATE not in name
    )
    return ModelSize(sum(state.values()), trained, saved)


def memory_needed(method: str, config: Config, data: Dataset, trial: Trial) -> int:
    """Estimate the bytes that the training of a method needs on its device, beside the dataset."""
    own, parts = local_micro_batches(config)
    samples = -(-max(map(sum, epoch_step_sizes(config, data))) // parts)
    scores = 2 * 4 * samples * data.num_classes  # and their gradient
    steps = 1 if config.runtime.resolved_device == "cpu" else 2  # a GPU's next step is prepared ahead
    inputs = steps * len(own) * samples * trial.values * _value_size(config, data)
    return fixed_memory(method, config, data, trial) + samples * trial.activations + scores + inputs


def _value_size(config: Config, data: Dataset) -> int:
    """Return the bytes of a value of the samples in a step. Augmentations that compute pixels make images float32."""
    augment = config.augment
    resized = augment.crop_scale is not None and augment.auto_augment == "none"  # whose results are uint8
    computed = resized or augment.color_jitter or augment.mixup or augment.cutmix
    return 4 if data.is_images and computed else data.x_train.element_size()


def fixed_memory(method: str, config: Config, data: Dataset, trial: Trial) -> int:
    """Estimate the part of `memory_needed` that does not depend on the size of a step."""
    copies = 1 + MOMENTS[config.optim.optimizer]  # 1: gradients
    states = _states(config)
    shards = distributed.world_size() if config.runtime.shard_classes else 1
    sizes = model_sizes(method, config, data, trial, shards)
    needed = max(states * size.state + copies * size.trained for size in sizes)
    if METHODS[method](config, data.train_counts).reads_training_features():
        needed += 2 * 4 * len(data.y_train) * trial.features  # all training features, concatenated
    return needed


def _states(config: Config) -> int:
    """Return the number of states of the model: its own, the average, and that of the best epoch."""
    return 1 + (config.optim.ema_decay is not None) + (config.optim.keep == "best")


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


def disk_needed(config: Config, data: Dataset, trial: Trial, shared: bool = False) -> int:
    """Estimate the bytes of a run's files: a checkpoint and its successor, a model per method, and the first stages.

    First stages are saved for other methods of the run and, if `shared`, for other runs.
    """
    stages = {method: model_sizes(method, config, data, trial) for method in config.method.methods}
    moments, states = MOMENTS[config.optim.optimizer], _states(config)
    checkpoints = (
        states * size.state + moments * size.trained for sizes in stages.values() for size in sizes
    )
    groups = [FIRST_STAGES.get(method) for method in stages]
    first = {
        group: sizes[0]
        for group, sizes in zip(groups, stages.values(), strict=True)
        if group and (shared or groups.count(group) > 1)
    }
    return (
        2 * max(checkpoints)
        + sum(last.saved for _, last in stages.values())
        + sum(states * size.state + moments * size.trained for size in first.values())
    )


def disk_available(config: Config) -> int:
    """Return the bytes that are free for the run's files, those of its folder included, which the run replaces."""
    folder = Path(config.run.runs) / config.run.name
    own = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return own + shutil.disk_usage(existing_folder(folder)).free
