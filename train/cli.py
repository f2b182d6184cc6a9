"""The command line: options in sections, with defaults from a recipe."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import sys
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from gistops import backends

from . import distributed
from .config import Config, ConfigError
from .data.load import NAMED
from .model.backbones import BACKBONES, TIMM
from .options import Mark, Sections
from .recipes import as_in_paper, default_options, is_own_data

Options = TypeVar("Options", bound=Sections)
Plain = TypeVar("Plain")


def program(command: str = "") -> str:
    """The name of the running program for help texts: `python -m train`, `gistops-train`, …"""
    script = Path(sys.argv[0]).name
    name = script if script == "gistops-train" else f"python -m {__package__}"
    return f"{name} {command}".rstrip()


def parse(
    args: list[str] | None,
    kind: type[Options],
    prog: str,
    description: str | None = None,
    own: type | None = None,
) -> Options:
    """Parse a command line and check the options as far as possible without the data.

    Args:
        args: the command line's words; those of sys.argv if None.
        kind: the options of the command: sections, and options of its own.
        prog: the program's name in help texts.
        description: the text above the options in --help; that of the options if None.
        own: the options of the command beside those of a run. If given, --help lists these alone.

    Raises:
        ConfigError: an invalid option.
        SystemExit: --help, an unknown option, or a value of another type (code 2).
    """
    description = inspect.getdoc(kind) if description is None else description
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--data")
    first.add_argument("--preset", default="")
    known = first.parse_known_args(args)[0]
    defaults = default_options(known.recipe, known.data)
    if known.preset == "paper":
        defaults = as_in_paper(defaults)
    values = defaults.options()
    with contextlib.ExitStack() as stack:
        if distributed.rank():  # rank 0 prints the help and the errors
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if own is not None and {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
            text = f"{description}\n\nTakes all options of training too, which `{program()} --help` lists."
            tyro.cli(own, args=["--help"], prog=prog, description=text)  # exits
        config = tyro.cli(
            kind,
            args=args,
            default=kind().replace(**{name: values[name] for name in kind.fields()}),
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    _check_repeated(sys.argv[1:] if args is None else args, config)
    values = config.options()
    if values.get("name") == "":
        of_data = is_own_data(known.recipe, known.data)
        name = data_name(values["data"]) if of_data else Path(values["recipe"]).stem
        config = config.replace(name=name)
    check(config)
    return config


def _check_repeated(args: list[str], config: Sections) -> None:
    """Refuse a list that is given twice, of which the second would replace the first.

    Of other options the last one counts, so that a script's options can be overridden.
    """
    lists = [name for name, value in {**vars(config), **config.options()}.items() if isinstance(value, tuple)]
    for name in lists:
        if (times := times_given(name, args)) > 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(name, f"all values after one {flag}", f"{times} times {flag}")


def times_given(option: str, args: list[str]) -> int:
    """Return how many times a command line's words give an option."""
    given = [word.partition("=")[0].replace("_", "-") for word in args]
    return given.count(f"--{option.replace('_', '-')}")


def data_name(data: str) -> str:
    """Return the name of a run on data that no recipe names: the data's name, without its suffix."""
    path = Path(data).resolve()
    if path.is_dir():
        inner = path.name.lower() in ("train", "training")
        return (path.parent if inner else path).name or "data"
    name = path.name
    for suffix in (".gz", ".tgz", path.suffix):
        name = name.removesuffix(suffix)
    return name.removesuffix(".tar") or "data"


def parse_run(args: list[str] | None = None) -> Config:
    """Parse the options of a run; see `parse`."""
    return parse(args, Config, program())


def parse_command(args: list[str], kind: type[Plain], command: str) -> Plain:
    """Parse the command line of a command whose options are not those of a run: a dataclass with a field per option.

    Raises:
        SystemExit: --help, an unknown option, or a value of another type (code 2).
    """
    return tyro.cli(kind, args=args, prog=program(command), config=(tyro.conf.FlagCreatePairsOff,))


def check(config: Sections) -> None:
    """Check the options whose valid values depend on this machine or on the driver's datasets and networks.

    Raises:
        ConfigError: the first invalid option.
    """
    values = config.options()
    if not values["data"]:
        expected = f"a file, a folder, or {', '.join(NAMED)} (the recipe {values['recipe']} brings no data)"
        raise ConfigError("data", expected, repr(values["data"]))
    _check_text(config)
    if "backbone" in values:
        _check_backbone(values["backbone"], values["pretrained"], values["pretrained_file"])
    for name in values.get("track", ()):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without an origin it is a folder of that name
            expected = f"the package {name}, which `pip install '.[{name}]'` brings"
            raise ConfigError("track", expected, f"{name}, which is not installed")
    if "device" in values:
        check_device(config.runtime.resolved_device, values.get("backend", "auto"))  # type: ignore[attr-defined]


def _check_text(config: Sections) -> None:
    """Check that texts can be recorded in config.toml: the bytes of a path need not be UTF-8."""
    unrecorded = config.marked(Mark.UNRECORDED)
    for name, value in config.options().items():
        if name in unrecorded:
            continue
        for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            if isinstance(text, str) and not _is_utf8(text):
                raise ConfigError(name, "text in UTF-8, because config.toml records it", text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_backbone(backbone: str, pretrained: bool, pretrained_file: str) -> None:
    is_timm = backbone.startswith(TIMM)
    if not is_timm and backbone not in ("none", *BACKBONES):
        raise ConfigError("backbone", f"one of none, {', '.join(BACKBONES)}, or {TIMM}NAME", repr(backbone))
    option = "pretrained_file" if pretrained_file else "pretrained"
    if (pretrained or pretrained_file) and not is_timm:
        raise ConfigError(option, f"a backbone {TIMM}NAME, which has pretrained weights", repr(backbone))
    if pretrained and pretrained_file:
        raise ConfigError(option, "either --pretrained or --pretrained-file", "both")
    if pretrained_file and not Path(pretrained_file).is_file():
        raise ConfigError(
            option, "a file of weights, .safetensors or .pth", f"{pretrained_file}, which does not exist"
        )


def check_device(device: str, backend: str = "auto") -> None:
    """Check that a device and a backend are available here.

    Raises:
        ConfigError: one of them is not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        got = f"{device!r} ({error})".split("\n")[0]
        raise ConfigError("device", "cpu, cuda or auto", got) from None
    try:
        backends.choose(torch.device(device).type, None if backend == "auto" else backend)
    except (ValueError, RuntimeError) as error:
        raise ConfigError("backend", "a backend that is available here", f"{backend!r} ({error})") from None
