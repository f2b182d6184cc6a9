"""A run's configuration from the command line and a recipe, a file of options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeVar, get_type_hints, overload

import torch
import typeguard
import tyro

from .config import DEFAULT_RECIPE, DEPARTURES, Config, ConfigError, check

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

RECIPES = Path(__file__).with_name("recipes")

Options = TypeVar("Options", bound=Config)


@overload
def from_command_line(args: list[str] | None = None) -> Config: ...


@overload
def from_command_line(args: list[str] | None, kind: type[Options]) -> Options: ...


def from_command_line(args: list[str] | None = None, kind: type[Config] = Config) -> Config:
    """The configuration that the command line asks for, checked as far as it can be without the data.

    Args:
        args: the command line's words; sys.argv's if None.
        kind: Config, or a dataclass with options beside it.

    Raises:
        ConfigError: an option that cannot be.
        SystemExit: --help, or an option that is none (code 2).
    """
    first = argparse.ArgumentParser(prog="python -m train", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=DEFAULT_RECIPE)
    first.add_argument("--preset", default="")
    asked = first.parse_known_args(args)[0]
    defaults = load_recipe(asked.recipe)
    if asked.preset == "paper":
        plain = Config()
        defaults = dataclasses.replace(defaults, **{name: getattr(plain, name) for name in DEPARTURES})
    config = tyro.cli(
        kind,
        args=args,
        default=kind(**{field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}),
        prog="python -m train",
        description=_description(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = dataclasses.replace(
        config,
        name=config.name or Path(config.recipe).stem,
        device=_device(config.device),
    )
    check(config)
    return config


def _recipe_file(recipe: str) -> Path:
    return Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"


def _read_recipe(recipe: str) -> dict[str, Any]:
    try:
        with open(_recipe_file(recipe), "rb") as file:
            values: dict[str, Any] = tomllib.load(file)
            return values
    except FileNotFoundError:
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
        raise ConfigError("recipe", f"a .toml file that is there, or one of {names}", repr(recipe)) from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("recipe", "a readable TOML file", f"{recipe}: {error}") from None


def load_recipe(recipe: str) -> Config:
    """The configuration that a recipe alone gives.

    Raises:
        ConfigError: there is no such recipe, or it holds something that is no option or of a wrong type.
    """
    values = {key: value for key, value in _read_recipe(recipe).items() if key != "description"}
    values["recipe"] = recipe
    hints = get_type_hints(Config)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError("recipe", "the names of options as keys", f"{key!r} in {recipe}")
        if isinstance(value, list):
            values[key] = value = tuple(value)
        try:
            typeguard.check_type(value, hints[key])
        except typeguard.TypeCheckError as error:
            expected = Config.__annotations__[key]
            raise ConfigError(key, expected, f"{value!r} in the recipe {recipe} ({error})") from None
    return Config(**values)


def typed_value(option: str, text: str) -> Any:
    """What `text` means as the value of an option, as in a recipe but that words need no quotes.

    Raises:
        ConfigError: there is no such option, or it takes one value and this is none of its.
    """
    hints = get_type_hints(Config)
    if option not in hints:
        raise ConfigError("vary", "the name of an option", repr(option))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if hints[option] is float and type(value) is int:
        value = float(value)
    try:
        typeguard.check_type(value, hints[option])
    except typeguard.TypeCheckError as error:
        raise ConfigError(option, Config.__annotations__[option], f"{text!r} ({error})") from None
    return value


def _description() -> str:
    paragraphs = [
        "Trains GistNet in two stages on a long-tailed set, and a plain softmax model beside it.",
        "Recipes:",
    ]
    for path in sorted(RECIPES.glob("*.toml")):
        paragraphs.append(f"{path.stem}: {_read_recipe(path.stem).get('description', '')}")
    return "\n\n".join(paragraphs)


def _device(asked: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
