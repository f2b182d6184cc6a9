"""What a run is told: one typed record."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from gistops import backends

from .data.load import NAMED, Source
from .model.backbones import BACKBONES, TIMM
from .shot_groups import SPLIT_RULES

DEFAULT_RECIPE = "fashion-mnist-lt"


#: What becomes of the displacements, in the second stage alone.
STRUCTURE = (
    "displacement_init",
    "displacement_scale",
    "displacement_lr",
    "displacement_weight_decay",
    "displacement_update",
    "transfer_directions",
    "transfer_length",
)

#: What --preset paper puts back to its default, which is the paper's.
DEPARTURES = ("center_features", *STRUCTURE)


class ConfigError(ValueError):
    """An option that cannot be; the message names it, what was expected and what came."""

    def __init__(self, option: str, expected: str, got: object) -> None:
        super().__init__(f"--{option.replace('_', '-')}: expected {expected}, got {got}")


MethodName = Literal[
    "gist",
    "plain",
    "cos-cb",
    "cos-cs-cb",
    "cos-gist",
    "gist-combined",
    "gist-rotation",
    "gist-mlp",
    "balanced-softmax",
    "cos-balanced-softmax",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run. The defaults are the paper's where it names one; a recipe replaces them."""

    recipe: str = DEFAULT_RECIPE
    """Where the other options start from: a recipe's name, or a .toml file, such as a run's config.toml."""
    name: str = ""
    """The run's folder under --runs; the recipe's name if empty."""
    runs: str = "runs"
    """Where the runs' folders are."""
    resume: bool = False
    """Go on from the run's last checkpoint, or begin where there is none."""

    preset: Literal["recipe", "paper"] = "recipe"
    """paper: where a recipe departs from the paper to keep the displacements in use (centred features, another start,
    a rate or a decay of their own), the paper's way again. What the command line says still holds."""

    data: str = ""
    """A .npz or .safetensors file with x_train, y_train, x_test and y_test (and x_val and y_val, or not), where x is uint8 images [n, h, w] or
    [n, h, w, c] or floating-point features [n, d]. CIFAR's archive from its authors (cifar-100-python.tar.gz). A list
    of image files, .txt (path label, as ImageNet-LT's), .csv or .json (iNaturalist's). A folder with train/ and test/
    (or val/), where each class has a folder. Or the name of a set: fashion-mnist-lt, which comes with the package, or
    glyphs, 8,141 Chinese characters drawn with the system's fonts."""
    test_data: str = ""
    """The list or folder of test images; if not given, the one beside --data with test (or val) in its name instead of
    train."""
    val_data: str = ""
    """The list or folder of validation images; if neither it nor --test-data is given, the one with val in its name
    where there is one with test. Epochs are evaluated on it, results on the test images."""
    images: str = ""
    """Where the paths in lists begin; the list's own folder if not given."""
    path_prefixes: tuple[str, ...] = ()
    """OLD=NEW: paths in lists that begin with OLD begin with NEW instead, such as data_256/a/=train/."""
    image_size: int = 64
    """Side of the squares that image files are cut and resized to when they are decoded, and characters are drawn on, once,
    into --cache."""
    unreadable: Literal["stop", "skip"] = "stop"
    """What an image file that cannot be read does: stop, or be left out. It is named either way."""
    cache: str = ""
    """Where decoded and drawn images are kept; ~/.cache/gistops/images if not given."""
    imbalance_ratio: float = 1.0
    """Makes a balanced training set long-tailed: the largest class over the smallest, by the rule of CIFAR-LT."""
    num_classes: int | None = None
    """How many classes the data must have; taken from the data if not given."""
    backbone: str = "resnet32"
    """A network for images (resnet20 or resnet32 for 32×32, resnet8-half for 28×28 on a CPU, resnet10 for 224×224), or
    timm/NAME for any of timm's, such as timm/resnet50 (`pip install timm`); or none for a head alone on features."""
    pretrained: bool = False
    """Begin with timm's weights for the network, which it downloads."""
    center_features: bool = False
    """Batch normalisation without parameters between backbone and head, in every method. Not in the paper. After a
    ReLU all features share a direction, which pushes the displacements out of use; this takes it away."""
    crop_padding: int = 0
    """Images: random crops after padding by so many pixels on each side."""
    flip: bool = False
    """Images: random horizontal flips."""
    crop_size: int | None = None
    """Images: side of the squares that the network sees, random ones in training, the middle in tests; whole images if not
    given."""
    crop_scale: float | None = None
    """Images: random crops take this share of the area or more, at any aspect ratio from 3/4 to 4/3, and are resized
    to --crop-size."""
    color_jitter: float = 0.0
    """Images: brightness, contrast and saturation change by up to this share."""

    methods: tuple[MethodName, ...] = ("gist", "plain")
    """What to train, each with as many image passes. gist is GistNet, COS+CS+GIST in the paper's Table 3; cos-cb,
    cos-cs-cb, cos-gist, gist-combined (w = v), gist-rotation and gist-mlp are its other rows; plain is a linear
    softmax classifier; balanced-softmax and cos-balanced-softmax add the log prior to their logits in training."""
    num_displacements: int = 4
    """Displacements of the constellation that all classes share; 0 for none."""
    displacement_init: Literal["random", "residuals"] = "random"
    """Where they start: random directions, or those in which the larger classes' features spread around their
    means. (The paper does not say; its authors' code starts at zero, from where they never move.) A rotation's or an
    MLP's are always random."""
    displacement_scale: float | None = None
    """Their length at the start relative to the centres'; 0.1 if not given, and 1 for an MLP."""
    displacement_lr: float = 1.0
    """Their learning rate as a multiple of --lr; 0 leaves them where they start."""
    displacement_weight_decay: float | None = None
    """Their weight decay; --weight-decay if not given."""
    displacement_update: Literal["gradient", "residuals"] = "gradient"
    """How they move: by gradients, or to the directions of residuals, found anew after every epoch, at --displacement-scale."""
    transfer_directions: int = 0
    """GistNet: in the second stage each feature of the balanced stream is displaced by one of so many directions in which
    the larger classes spread, found anew after every epoch, so that small classes vary as they do; 0: not. Not in the paper."""
    transfer_length: float = 0.7
    """How far, with features of unit length."""
    prior_strength: float = 1.0
    """What the log prior is multiplied with where it is added in training, or taken off afterwards."""
    balanced_loss_weight: float = 0.5
    """GistNet: λ in L = L_random + λ L_balanced."""
    batch_size: int = 128
    """Images that the random stream gives to a step, of all processes together. An epoch is one pass of it."""
    classes_per_batch: int = 32
    """Classes in the balanced stream's part of a step."""
    samples_per_class: int = 4
    """Images of each of these classes. A method without a balanced stream gets as many more from the random one."""
    accumulate: int = 1
    """Micro-batches that a step is divided into, for less memory: the same gradients, but for batch normalisation's
    statistics, which are of a micro-batch."""
    batch_norm: Literal["joint", "split"] = "joint"
    """Whether both streams go through the backbone together, and so share the statistics of its batch normalisations,
    or one after the other. With several processes (torchrun) the statistics are of all their samples either way."""

    stage1_epochs: int = 60
    """The first stage, without displacements. Softmax classifiers train in one stage as long as both."""
    stage2_epochs: int = 60
    """The second stage, with displacements; optimiser and schedule start afresh."""
    max_steps_per_epoch: int | None = None
    """Ends every epoch after so many steps, for a quick trial."""
    lr: float = 0.1
    """Learning rate at the start of a stage (SGD)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of everything but the temperatures."""
    schedule: Literal["step", "cosine"] = "step"
    """How the rate falls within a stage: to a tenth at each of --lr-drops, or along a cosine to zero."""
    lr_drops: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Where the step schedule drops, in parts of the stage (the paper's 15, 30 and 45 of 60 epochs)."""
    warmup_epochs: float = 0.0
    """The rate grows linearly over so many epochs at the start of a stage."""

    split_rule: str = "standard"
    """What many- and few-shot mean in training images: standard (>100, <20), paper_text (>100, <=20) or paper_code
    (>=100, <=20)."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the validation images, or the test images where there are none; the last epoch
    of a stage is always evaluated. Slot usage is watched after every epoch. A method's result is of the test images."""
    tensorboard: bool = False
    """Also writes every epoch's numbers to runs/<name>/tensorboard/<method> (`pip install tensorboard`)."""
    checkpoint_steps: int | None = None
    """Also writes a checkpoint every so many steps, not only after each epoch."""
    checkpoint_seconds: float = 0.0
    """Writes no checkpoint after an epoch within so many seconds of the one before: for epochs that take less than it does."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same bits on the CPU."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    backend: Literal["auto", "cpu", "cuda", "triton", "reference"] = "auto"
    """Which of gistops' backends computes the heads; reference is the definition written out in plain PyTorch."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if not given."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """What the network is trained in: bf16 and fp16 by torch.autocast, fp16 with a gradient scaler. Weights, losses
    and accuracies are float32 always."""
    compile: bool = False
    """torch.compile the network, as it is trained."""
    cuda_graph: bool = False
    """On a GPU, hold a whole step in a CUDA graph: for small networks, whose many kernels take longer to launch than to
    run. The samples must fit on the GPU; not with fp16 or several processes."""


def backend_of(config: Config) -> str | None:
    """As heads take it."""
    return None if config.backend == "auto" else config.backend


def source_of(config: Config) -> Source:
    """The part that says which data."""
    return Source(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Source)})


def config_values(config: Config) -> dict[str, Any]:
    """What decides a run's outcome, as plain values: not where it came from or lies, nor that it is resumed or shown."""
    values = dataclasses.asdict(config)
    for other in ("recipe", "runs", "resume", "cache", "tensorboard"):
        del values[other]
    return values


def check(config: Config) -> None:
    """Refuse what no data could make sense of.

    Raises:
        ConfigError: names the first option that is wrong.
    """

    def expect(option: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ConfigError(option, expected, repr(getattr(config, option)))

    for option in ("batch_size", "classes_per_batch", "samples_per_class", "accumulate", "evaluate_every"):
        expect(option, getattr(config, option) >= 1, "at least 1")
    for option in ("max_steps_per_epoch", "checkpoint_steps", "threads", "num_classes"):
        expect(option, getattr(config, option) is None or getattr(config, option) >= 1, "at least 1")
    for option in ("stage1_epochs", "stage2_epochs", "crop_padding", "warmup_epochs", "weight_decay", "seed"):
        expect(option, getattr(config, option) >= 0, "at least 0")
    expect("checkpoint_seconds", config.checkpoint_seconds >= 0, "at least 0")
    expect("stage1_epochs", config.stage1_epochs + config.stage2_epochs > 0, "some epoch in some stage")
    expect("num_displacements", 0 <= config.num_displacements <= 255, "0 to 255")
    expect("preset", config.preset in ("recipe", "paper"), "recipe or paper")
    expect("batch_norm", config.batch_norm in ("joint", "split"), "joint or split")
    expect("precision", config.precision in ("float32", "bf16", "fp16"), "float32, bf16 or fp16")
    expect("imbalance_ratio", config.imbalance_ratio >= 1, "at least 1")
    expect("image_size", config.image_size >= 1, "at least 1")
    expect("displacement_init", config.displacement_init in ("random", "residuals"), "random or residuals")
    expect(
        "displacement_update",
        config.displacement_update in ("gradient", "residuals"),
        "gradient or residuals",
    )
    expect("transfer_directions", config.transfer_directions >= 0, "at least 0")
    expect("transfer_length", config.transfer_length > 0, "a number above 0")
    scale = config.displacement_scale
    expect("displacement_scale", scale is None or scale > 0, "a number above 0")
    expect("displacement_lr", config.displacement_lr >= 0, "at least 0")
    decay = config.displacement_weight_decay
    expect("displacement_weight_decay", decay is None or decay >= 0, "at least 0")
    expect("prior_strength", config.prior_strength >= 0, "at least 0")
    expect("balanced_loss_weight", config.balanced_loss_weight >= 0, "at least 0")
    expect("lr", config.lr > 0, "a number above 0")
    expect("momentum", 0 <= config.momentum < 1, "at least 0 and below 1")
    expect("lr_drops", all(0 < drop < 1 for drop in config.lr_drops), "parts of a stage, between 0 and 1")
    expect("methods", len(config.methods) > 0, f"at least one of {', '.join(get_args(MethodName))}")
    expect("methods", len(set(config.methods)) == len(config.methods), "each method once")
    known = config.backbone in ("none", *BACKBONES) or config.backbone.startswith(TIMM)
    expect("backbone", known, f"one of none, {', '.join(BACKBONES)}, or {TIMM}NAME")
    expect(
        "pretrained",
        not config.pretrained or config.backbone.startswith(TIMM),
        f"no weights but for {TIMM}NAME",
    )
    expect("crop_size", config.crop_size is None or config.crop_size >= 1, "at least 1")
    expect(
        "crop_scale",
        config.crop_scale is None or 0 < config.crop_scale <= 1,
        "a share, above 0 and at most 1",
    )
    expect("color_jitter", 0 <= config.color_jitter <= 1, "a share, 0 to 1")
    expect("split_rule", config.split_rule in SPLIT_RULES, f"one of {', '.join(SPLIT_RULES)}")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard", "the package, which `pip install tensorboard` brings", "none")
    own = Path(config.name).name == config.name and config.name != ".."
    expect("name", own, "a folder's name, not a path (see --runs)")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "device", "cpu, cuda or auto", f"{config.device!r} ({error})".split("\n")[0]
        ) from None
    try:
        backends.choose(torch.device(config.device).type, backend_of(config))
    except (ValueError, RuntimeError) as error:
        raise ConfigError("backend", "one that can serve here", f"{config.backend!r} ({error})") from None
    needed = f"a file, a folder, or {', '.join(NAMED)}"
    expect("data", bool(config.data), f"{needed} (the recipe {config.recipe} brings no data)")
