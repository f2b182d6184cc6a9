"""The driver, which trains GistNet and a plain softmax classifier for comparison. See `python -m train --help`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier
    from .config import Config


def load(path: str | Path) -> Classifier:
    """Load a trained model, `runs/<name>/model-<method>.safetensors`, to classify images or features.

    Raises:
        ValueError: the file is of an earlier version, which does not say how images are prepared.
        ModelFileError: the file is truncated or damaged, or is not from a run.
        OSError: the file does not exist or cannot be read.
    """
    from .classifier import Classifier  # here, because processes that decode images need no torch
    from .surroundings import usual_settings
    from .trained import load_trained

    with usual_settings():
        return Classifier(load_trained(path))


def fit(recipe: str | Config | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    """Train as `python -m train` does, without its console, and return the result of each method by the method's name.

    A result has the accuracies of the run's metrics.jsonl, and `model`, the path of the model file for `load`. PyTorch's default
    dtype and device, autocast and the mode of gradients, which the program may have set, have no effect.

    Args:
        recipe: a recipe's name, a .toml file, or a `Config`, whose run is named after its data if it has no name. If not given,
            `data` of your own takes the default recipe's options, and the classes and the run's name from the data.
        **options: options of the command line with underscores, such as `data="birds/", stage1_epochs=20`.

    Raises:
        ConfigError: an invalid option.
        Diverged: the loss or a weight is not finite.
    """
    from rich.console import Console

    from .cli import check, data_name
    from .recipes import configure
    from .run import start
    from .surroundings import usual_settings
    from .unused_options import unused_options

    config = configure(recipe, options)
    check(config)
    for unused in unused_options([config], [f"--{name}" for name in options]):
        warnings.warn(unused, RuntimeWarning, stacklevel=2)
    if not config.run.name:
        config = config.replace(name=data_name(config.data.data))
    folder = Path(config.run.runs) / config.run.name
    with usual_settings():
        results = start(config, Console(quiet=True))
    return {
        result["method"]: result | {"model": folder / f"model-{result['method']}.safetensors"}
        for result in results
    }
