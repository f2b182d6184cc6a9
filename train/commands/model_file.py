"""Files that a command line names: every fault of a model file, and of a file to write, is an invalid option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..config import ConfigError
from ..model.backbones import BackboneError
from ..model.model import Model, ModelFileError, Normalize

Loaded = TypeVar("Loaded")

#: Errors of descriptions and tensors that do not belong together, as in a file that another version or program has written.
UNFIT = (ConfigError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)


def open_model(option: str, path: str | Path, load: Callable[[str | Path], Loaded]) -> Loaded:
    """Return `load(path)`, the model of a file that an option names.

    Args:
        option: the option, for the error.
        path: the option's value.
        load: `load_trained`, `load_model` or the like.

    Raises:
        ConfigError: the file is missing, unreadable, damaged, of an earlier version or no model, or its network is unavailable.
    """
    if Path(path).is_dir():
        models = ", ".join(sorted(file.name for file in Path(path).glob("model-*.safetensors")))
        raise ConfigError(option, ModelFileError.expected, f"the folder {path}, with {models or 'no model'}")
    try:
        return load(path)
    except ModelFileError as error:
        raise ConfigError(option, error.expected, error.got) from None
    except BackboneError as error:
        raise ConfigError(option, f"a model whose network is available: {error}", path) from None
    except OSError as error:
        why = error.strerror or str(error).removesuffix(f": {path}")
        raise ConfigError(option, ModelFileError.expected, f"{path} ({why})") from None
    except UNFIT as error:
        why = str(error).partition("\n")[0]
        got = f"{path}, which is damaged or of another version ({type(error).__name__}: {why})"
        raise ConfigError(option, ModelFileError.expected, got) from None


def expect_images(option: str, path: str | Path, model: Model) -> None:
    """Refuse the model of a file that an option names if it takes features.

    Raises:
        ConfigError: the model takes features.
    """
    if not isinstance(model.normalize, Normalize):
        raise ConfigError(option, "a model of images", f"{path}, a model of features")


def check_out(out: Path, model: Path | None = None) -> None:
    """Refuse a file to write that is in no folder, is a folder or a device, or is the model that the command reads.

    Raises:
        ConfigError: the file cannot be written, or should not be.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError("out", "a file in an existing folder", out)
    if out.exists() and not out.is_file():
        raise ConfigError("out", "a file", f"{out}, which is a {'folder' if out.is_dir() else 'device'}")
    if model is not None and out.exists() and model.exists() and out.samefile(model):
        raise ConfigError("out", "another file than the model", out)
