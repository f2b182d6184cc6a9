"""The options of a run: one frozen dataclass per section, with the checks of its values beside its fields.

A command line flag, a key of a recipe and a field here have the same name, and names are unique over all sections.
Code that handles every option (recipes, checkpoints, ablations) reads the marks of the fields; see `options.Mark`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .data_options import DataConfig as DataConfig
from .method_options import BaselineConfig as BaselineConfig
from .method_options import DisplacementConfig as DisplacementConfig
from .method_options import MethodConfig as MethodConfig
from .method_options import MethodName as MethodName
from .options import ConfigError as ConfigError
from .options import Mark, Section, Sections, option
from .shot_groups import SplitRule
from .tuning_options import TuningConfig as TuningConfig

DEFAULT_RECIPE = "fashion-mnist-lt"
MAX_THREADS = 1024  # OpenMP ends in a segmentation fault if the system refuses it a thread


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(Section):
    """The recipe."""

    #: Defaults of the other options: the name of a recipe, or a .toml file such as config.toml in the folder
    #: of a run.
    recipe: str = option(DEFAULT_RECIPE, Mark.UNRECORDED | Mark.IDENTITY)


@dataclass(frozen=True, kw_only=True)
class RunConfig(RecipeConfig):
    """The run and its folder."""

    #: Name of the run's folder in --runs. If not given, the name of --recipe; without --recipe, that of
    #: the data.
    name: str = option("", Mark.SECOND_STAGE | Mark.IDENTITY)
    #: Folder that holds the folders of all runs.
    runs: str = option("runs", Mark.UNRECORDED | Mark.IDENTITY)
    #: Continue from the last checkpoint of the run, or start if there is none.
    resume: bool = option(False, Mark.UNRECORDED | Mark.IDENTITY)
    #: paper: use the paper's settings where a recipe departs from them for accuracy or to keep the
    #: displacements in use (centered features, the balanced loss, the start of the centers, and how
    #: displacements start and move). Options on the command line take precedence.
    preset: Literal["recipe", "paper"] = option("recipe", Mark.SECOND_STAGE | Mark.IDENTITY)
    #: Seed of all random numbers. The same seed gives bitwise identical results on one CPU with one number of --threads.
    seed: int = option(0, Mark.IDENTITY)
    #: Epochs between two evaluations on the validation samples, or on the test samples if there are none. The
    #: last epoch of a stage is always evaluated. Slot usage (the share of the samples that each slot wins) is
    #: measured after every epoch. Final results are always on the test samples.
    evaluate_every: int = 1
    #: Number of training samples of many-shot and few-shot classes: standard (>100, <20),
    #: paper_text (>100, <=20) or paper_code (>=100, <=20).
    split_rule: SplitRule = "standard"
    #: Also send the numbers of every epoch and the results to these: tensorboard (runs/<name>/tensorboard), wandb (Weights &
    #: Biases) and mlflow. Extras of the same names install their packages, whose own environment variables set the
    #: server, the project and offline modes. A resumed run continues there. A tracker that fails does not end the run.
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = option((), Mark.UNRECORDED)
    #: Also write a checkpoint every this many steps, not only after epochs.
    checkpoint_steps: int | None = option(None, Mark.CHANGEABLE)
    #: Skip the checkpoint after an epoch if the last one is less than this many seconds old. For epochs that
    #: are shorter than writing a checkpoint.
    checkpoint_seconds: float = option(0.0, Mark.CHANGEABLE)

    def __post_init__(self) -> None:
        self._expand_home("runs")
        self._expect_at_least(1, "evaluate_every", "checkpoint_steps")
        self._expect_at_least(0, "seed", "checkpoint_seconds")
        self._expect("seed", self.seed < 2**32, "below 2^32")  # as scikit-learn and NumPy take
        is_name = Path(self.name).name == self.name and self.name != ".."
        self._expect("name", is_name, "a folder's name, not a path (see --runs)")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Section):
    """The backbone."""

    #: Network for images: resnet20 or resnet32 (for 32×32), resnet8-half (28×28 on a CPU),
    #: resnet10 (224×224), or timm/NAME for a network of timm, such as timm/resnet50 (`pip install timm`).
    #: none: a head alone, on features.
    backbone: str = "resnet32"
    #: Start from the pretrained weights of timm, which are downloaded. Images are then normalized as timm says.
    pretrained: bool = False
    #: Start from the weights in this file, .safetensors or .pth with timm's parameter names, in place of a download.
    pretrained_file: str = ""

    def __post_init__(self) -> None:
        self._expand_home("pretrained_file")

    @property
    def weights(self) -> bool | str:
        """The weights that the network starts from: a file; otherwise, whether those of timm."""
        return self.pretrained_file or self.pretrained


@dataclass(frozen=True, kw_only=True)
class CenteringConfig(Section):
    """The layer between backbone and head."""

    #: Apply batch normalization without parameters between backbone and head, in every method. Not in the
    #: paper. After a ReLU all features share one direction, which keeps displacements from being used; this
    #: layer removes the shared direction.
    center_features: bool = option(False, Mark.DEPARTURE)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CenteringConfig, BackboneConfig):
    """The model."""

    #: joint: run both streams through the backbone as one batch, so that they share the batch normalization
    #: statistics. split: run the two streams one after the other. With several processes (torchrun) the
    #: statistics are always those of the samples of all processes.
    batch_norm: Literal["joint", "split"] = "joint"


@dataclass(frozen=True, kw_only=True)
class CropConfig(Section):
    """The crop."""

    #: Side in pixels of the square crops that the network sees: random crops in training, center crops in
    #: evaluation. Whole images if not given.
    crop_size: int | None = None

    def __post_init__(self) -> None:
        self._expect_at_least(1, "crop_size")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(CropConfig):
    """Augmentation of training images."""

    #: Random crops after padding by this many pixels on each side.
    crop_padding: int = 0
    #: Random horizontal flips.
    flip: bool = False
    #: Random crops of at least this fraction of the area, with an aspect ratio between 3/4 and 4/3, resized
    #: to --crop-size. Crops are not resized if not given.
    crop_scale: float | None = None
    #: Random changes of brightness, contrast and saturation by up to this fraction.
    color_jitter: float = 0.0
    #: TrivialAugment or RandAugment of each image after crops and flips, by torchvision (`pip install '.[augment]'`),
    #: with its defaults. Crops, flips, jitter, mixup and CutMix need no torchvision.
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    #: Mixup: training samples are mixed in pairs, with shares from Beta(α, α), and so are the losses of their
    #: labels. α is this value; 0 turns it off. Pairs are from one stream of one process and micro-batch. For images and features, and
    #: for methods whose loss is a mean over samples; lifted, range, fslwf, oltr and lfme are refused.
    mixup: float = 0.0
    #: CutMix: a box of each image is replaced by that of another one, and the losses of their labels are mixed by
    #: area, which is from Beta(α, α). α is this value; 0 turns it off. With --mixup each step has one of the two, at
    #: random.
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_at_least(0, "crop_padding", "mixup", "cutmix")
        valid = self.crop_scale is None or 0 < self.crop_scale <= 1
        self._expect("crop_scale", valid, "a fraction, above 0 and at most 1")
        self._expect("color_jitter", 0 <= self.color_jitter <= 1, "a fraction, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimizer and schedule."""

    #: Epochs of the first stage, without displacements. Softmax classifiers train in one
    #: stage of --stage1-epochs plus --stage2-epochs.
    stage1_epochs: int = 60
    #: Epochs of the second stage, with displacements. Optimizer and schedule start afresh.
    stage2_epochs: int = option(60, Mark.SECOND_STAGE)
    #: End every epoch after this many steps, for a quick trial.
    max_steps_per_epoch: int | None = None
    #: sgd: stochastic gradient descent with --momentum, as in the paper. adamw: AdamW, as transformers are tuned, with
    #: PyTorch's defaults beside --lr and --weight-decay. Its learning rate is about 1e-3, or 1e-5 to 1e-4 for all weights
    #: of a pretrained network.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    #: Learning rate at the start of a stage.
    lr: float = 0.1
    #: Learning rate of the backbone as a multiple of --lr.
    backbone_lr: float = 1.0
    #: Momentum of SGD.
    momentum: float = 0.9
    #: Scale the gradients of each step down to this norm over all parameters, if theirs is larger. Not clipped if not
    #: given.
    clip_gradient_norm: float | None = None
    #: Weight decay of all parameters except the temperatures.
    weight_decay: float = 5e-4
    #: How the learning rate falls within a stage: to a tenth at each of --lr-drops, or along a cosine to
    #: zero.
    schedule: Literal["step", "cosine"] = "step"
    #: Positions of the drops of the step schedule, as fractions of the stage. The default is the paper's:
    #: after epochs 15, 30 and 45 of 60.
    lr_drops: tuple[float, ...] = (0.25, 0.5, 0.75)
    #: Epochs at the start of a stage in which the learning rate grows linearly from 0; not in the second stage of
    #: crt and lws.
    warmup_epochs: float = 0.0
    #: Decay of an exponential average of the weights, such as 0.999, which is evaluated and saved in place of the weights.
    #: It starts with each stage, and replaces the weights where the stage ends. No average if not given.
    ema_decay: float | None = None
    #: Weights that a stage ends with: those of its last epoch, or those of its best epoch by the mean of the classes'
    #: accuracies on the validation samples, which --hold-out-val makes.
    keep: Literal["last", "best"] = "last"
    #: End a stage after this many evaluations in a row without a better one. With --keep best.
    patience: int | None = None
    #: Micro-batches per step, to save memory. Gradients are the same, except that batch normalization and
    #: the losses of ldam-drw, lifted, range, oltr and fslwf depend on the samples of a micro-batch.
    accumulate: int = 1

    def __post_init__(self) -> None:
        self._expect_at_least(1, "accumulate", "max_steps_per_epoch", "patience")
        valid = self.ema_decay is None or 0 < self.ema_decay < 1
        self._expect("ema_decay", valid, "a number between 0 and 1")
        self._expect("keep", self.keep == "best" or self.patience is None, "best, which --patience needs")
        self._expect_at_least(0, "stage1_epochs", "stage2_epochs", "warmup_epochs", "weight_decay")
        epochs = self.stage1_epochs + self.stage2_epochs
        self._expect("stage1_epochs", epochs > 0, "at least 1 if --stage2-epochs is 0")
        self._expect_above_0("lr", "backbone_lr", "clip_gradient_norm")
        self._expect("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        valid = all(0 < drop < 1 for drop in self.lr_drops)
        self._expect("lr_drops", valid, "fractions of a stage, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """The device."""

    #: cpu, cuda, or auto: a GPU if there is one.
    device: str = "auto"
    #: CPU threads; PyTorch's default if not given.
    threads: int | None = None

    def __post_init__(self) -> None:
        self._expect_at_least(1, "threads")
        self._expect("threads", (self.threads or 1) <= MAX_THREADS, f"at most {MAX_THREADS:,}")

    @property
    def resolved_device(self) -> str:
        """The device, with `auto` replaced by the device of this machine."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(DeviceConfig):
    """Device, backend and precision."""

    #: Backend of gistops that computes the heads. reference is the definition in plain PyTorch.
    backend: Literal["auto", "cpu", "cuda", "triton", "reference"] = "auto"
    #: Precision of the network in training: bf16 and fp16 use torch.autocast, fp16 with a gradient scaler.
    #: Weights, losses and evaluation are always float32.
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    #: Train the network with torch.compile.
    compile: bool = option(False, Mark.CHANGEABLE)
    #: On a GPU, capture each step in a CUDA graph. For small networks, whose kernels take longer to launch
    #: than to run. The samples must fit into GPU memory. Not with fp16 or several processes.
    cuda_graph: bool = option(False, Mark.CHANGEABLE)
    #: With several processes (torchrun), divide the classes of the head between them, so that no process has all
    #: centers. For methods with a cosine classifier or a constellation that is trained on its loss alone; not with
    #: fp16.
    shard_classes: bool = False

    @property
    def head_backend(self) -> str | None:
        """The backend as heads take it: None for auto."""
        return None if self.backend == "auto" else self.backend


@dataclass(frozen=True, kw_only=True)
class Config(Sections):
    """The options of a run. Defaults are the paper's where the paper names a value; a recipe replaces them."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    displacements: DisplacementConfig = field(default_factory=DisplacementConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def recorded(self) -> dict[str, Any]:
        """The options that influence a run's outcome, as plain values by name."""
        unrecorded = self.marked(Mark.UNRECORDED)
        return {name: value for name, value in self.options().items() if name not in unrecorded}
