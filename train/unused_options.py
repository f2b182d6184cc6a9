"""Options that are given and have no effect beside the others. A run, an ablation and `fit` warn of them, and doctor lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .cli import times_given
from .config import Config
from .data.glyphs.dataset import NAME as GLYPHS
from .data.load import is_list


@dataclass(frozen=True)
class Need:
    """A condition without which options have no effect.

    Args:
        what: in words, after "without".
        is_met: whether a run has it.
    """

    what: str
    is_met: Callable[[Config], bool]


def _method(*names: str) -> Need:
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    return Need(f"--methods {listed}", lambda config: bool({*names} & {*config.method.methods}))


NETWORK = Need("a network (--backbone)", lambda config: config.model.backbone != "none")
FILES = Need("image files in --data", lambda config: is_list(config.data.data))
RESIZED = Need("image files in --data", lambda config: FILES.is_met(config) or config.data.data == GLYPHS)
TRANSLATED = ("gist", "gist-combined", "cos-cs-cb")  # methods that add displacements to centers
DISPLACED = _method(*TRANSLATED, "gist-rotation", "gist-mlp")
TWO_STREAMS = ("gist", "cos-gist", "gist-combined", "gist-rotation", "gist-mlp")
NEEDS = {
    "backbone_lr": NETWORK,
    "balanced_loss_weight": _method(*TWO_STREAMS),
    "balancing": _method(*TWO_STREAMS),
    "cb_focal_gamma": _method("cb-focal"),
    "center_init": _method(*TWO_STREAMS, "cos-cb", "cos-cs-cb", "cos-balanced-softmax"),
    "class_balanced_beta": _method("cb-focal"),
    "color_jitter": NETWORK,
    "crop_padding": NETWORK,
    "crop_scale": NETWORK,
    "crop_size": NETWORK,
    "crt_epochs": _method("crt"),
    "displacement_init": _method(*TRANSLATED),
    "displacement_lr": DISPLACED,
    "displacement_scale": DISPLACED,
    "displacement_update": _method(*TRANSLATED),
    "displacement_weight_decay": DISPLACED,
    "flip": NETWORK,
    "hold_out_seed": Need(
        "--hold-out or --hold-out-val", lambda config: config.data.hold_out + config.data.hold_out_val > 0
    ),
    "image_size": RESIZED,
    "lora_rank": Need("--tune lora", lambda config: config.tuning.tune == "lora"),
    "lr_drops": Need("--schedule step", lambda config: config.optim.schedule == "step"),
    "momentum": Need("--optimizer sgd", lambda config: config.optim.optimizer == "sgd"),
    "num_displacements": DISPLACED,
    "tau_norm": _method("tau-norm"),
    "transfer_directions": _method("gist", "gist-rotation", "gist-mlp"),
    "transfer_length": Need(
        "--transfer-directions", lambda config: config.displacements.transfer_directions > 0
    ),
    "unreadable": FILES,
}


def unused_options(configs: Sequence[Config], args: list[str]) -> Iterator[str]:
    """Yield a warning for each option that a command line gives and that has no effect.

    Defaults are not meant: those of a recipe serve several kinds of data and methods.

    Args:
        configs: the options of each run. An option that one of them uses has an effect.
        args: the words of the command line.
    """
    for option, need in NEEDS.items():
        if times_given(option, args) and not any(map(need.is_met, configs)):
            yield f"--{option.replace('_', '-')} has no effect without {need.what}"
