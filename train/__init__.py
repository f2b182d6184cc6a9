"""The driver, which trains GistNet and a plain softmax classifier for comparison. See `python -m train --help`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classifier import Classifier


def load(path: str | Path) -> Classifier:
    """Load a trained model, `runs/<name>/model-<method>.safetensors`, to classify images or features.

    Raises:
        ValueError: the file is of an earlier version, which does not say how images are prepared.
        ModelFileError: the file is truncated or damaged, or is not from a run.
        OSError: the file does not exist or cannot be read.
    """
    from .classifier import Classifier  # here, because processes that decode images need no torch
    from .trained import load_trained

    return Classifier(load_trained(path))
