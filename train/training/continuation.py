"""The options with which a run is resumed: the same, or others with which it continues exactly.

A method may be added, because every method trains as if it were alone. A stage may be made longer if it has not begun, or if
neither its learning rate (`--schedule step` without `--lr-drops`) nor its loss depends on its length. The checkpoint holds the
state of one method, so stages of other methods that are finished cannot be made longer.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..config import Config, ConfigError
from ..methods import METHODS
from ..methods.method import Method
from ..options import Mark
from ..recipes import load_recipe

EPOCHS = ("stage1_epochs", "stage2_epochs")


def continued(config: Config, config_file: Path, saved: dict[str, Any], counts: Tensor) -> Config:
    """Return the options with which a run is resumed, with added methods last.

    Args:
        config: the options of the command line.
        config_file: the options of the run so far.
        saved: the checkpoint. If a finished stage is made longer, the checkpoint is moved back into the stage.
        counts: the number of training samples of each class, [K].

    Raises:
        ConfigError: with an option the run would not continue exactly.
    """
    before = load_recipe(str(config_file))
    old, new = before.recorded(), config.recorded()
    for option in sorted(new.keys() - config.marked(Mark.CHANGEABLE) - {"device", "methods", *EPOCHS}):
        if old[option] != new[option]:
            raise _differs(option, old[option], new[option], config_file)
    device = _device_of(before, config_file)
    if torch.device(device).type != torch.device(config.runtime.resolved_device).type:
        raise _differs("device", device, config.runtime.resolved_device, config_file)
    if missing := set(old["methods"]) - set(new["methods"]):
        expected = f"at least {', '.join(sorted(missing))} as in {config_file}, the run to resume"
        raise ConfigError("methods", expected, ", ".join(new["methods"]))
    changed = [option for option in EPOCHS if old[option] != new[option]]
    if changed and (reason := _lengthen(before, config, saved, counts)):
        raise _differs(changed[0], old[changed[0]], f"{new[changed[0]]}; {reason}", config_file)
    added = tuple(name for name in new["methods"] if name not in old["methods"])
    return config.replace(methods=old["methods"] + added)


def _differs(option: str, expected: object, got: object, config_file: Path) -> ConfigError:
    return ConfigError(option, f"{expected!r} as in {config_file}, the run to resume", got)


def _device_of(config: Config, config_file: Path) -> str:
    """Return the device of the run so far."""
    if config.runtime.device != "auto":
        return config.runtime.device
    try:
        device: str = json.loads(config_file.with_name("environment.json").read_text(encoding="utf-8"))[
            "device"
        ]
        return device
    except (OSError, ValueError, KeyError):
        return config.runtime.resolved_device


def _lengthen(before: Config, config: Config, saved: dict[str, Any], counts: Tensor) -> str:
    """Move the checkpoint back into a finished stage that is now longer; return why this is not exact, if it is not."""
    training, records = saved["training"], saved["records"]
    finished = [record["method"] for record in records if record["event"] == "result"]
    advice = "another --name trains anew"
    for name in before.method.methods:
        old, new = (
            [stage.epochs for stage in METHODS[name](options, counts).stages] for options in (before, config)
        )
        if old == new or not (name == training["name"] or name in finished):
            continue
        if name != training["name"]:
            return f"{name} is finished, and the checkpoint holds the state of {training['name']} alone; {advice}"
        stage = min(training["position"]["stage"], len(old) - 1)
        if old[:stage] != new[:stage]:
            return f"stage {stage} of {name} is over; {advice}"
        if old[stage] == new[stage]:
            continue
        optim = config.optim
        if new[stage] < old[stage] or optim.schedule != "step" or optim.lr_drops:
            reason = "the learning rate depends on the length of the stage"
            return f"{reason} that has begun, unless --schedule is step without --lr-drops; {advice}"
        if type(METHODS[name](config, counts)).begin_epoch is not Method.begin_epoch:
            return f"the loss of {name} depends on the length of the stage that has begun; {advice}"
        if training["position"]["stage"] == len(old):
            if config.optim.ema_decay is not None or config.optim.keep == "best":
                return f"other weights have replaced the last ones of the stage that is over; {advice}"
            if type(METHODS[name](config, counts)).finish is not Method.finish:
                return f"{name} has changed its head after its last stage; {advice}"
            training["position"] |= {"stage": stage, "epoch": old[stage], "step_of_epoch": 0}
            results = [r for r in records if r["event"] == "result" and r["method"] == name]
            for result in results:
                records.remove(result)
    return ""


def environment(config: Config) -> dict[str, Any]:
    """Return a description of the machine and the software that a run uses."""
    device = config.runtime.resolved_device
    on_gpu = device.startswith("cuda")
    return {
        "device": device,
        "processor": torch.cuda.get_device_name(device)
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "threads": config.runtime.threads or torch.get_num_threads(),
        "processes": distributed.world_size(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
