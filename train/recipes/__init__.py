"""Recipes: TOML files of options, keyed by their names. This module reads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_type_hints

import typeguard

from ..config import DEFAULT_RECIPE, Config, ConfigError
from ..files import TextError, read_text
from ..options import Mark

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

FOLDER = Path(__file__).parent

HINTS: dict[str, Any] = {
    name: hint for _, section in Config.sections() for name, hint in get_type_hints(section).items()
}


def recipe_names() -> list[str]:
    """Names of the recipes in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """Keys and values of a recipe, unchecked, with its description.

    Args:
        recipe: a recipe's name or a .toml file.

    Raises:
        ConfigError: the recipe does not exist or is not TOML.
    """
    try:
        path = Path(os.path.expanduser(recipe)) if recipe.endswith(".toml") else FOLDER / f"{recipe}.toml"
        values: dict[str, Any] = tomllib.loads(read_text(path))
        return values
    except FileNotFoundError:
        expected = f"an existing .toml file, or one of {', '.join(recipe_names())}"
        raise ConfigError("recipe", expected, repr(recipe)) from None
    except TextError as error:
        raise ConfigError("recipe", "a readable TOML file", str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        why = f"{recipe}: {error}".partition("\n")[0]
        raise ConfigError("recipe", "a readable TOML file", why) from None


def load_recipe(recipe: str) -> Config:
    """The configuration of a recipe alone.

    Raises:
        ConfigError: the recipe does not exist, or has a key that is no option or a value that is not valid.
    """
    values = {key: value for key, value in read_recipe(recipe).items() if key != "description"}
    values["recipe"] = recipe
    for key, value in values.items():
        if key not in HINTS:
            raise ConfigError("recipe", "the names of options as keys", f"{key!r} in {recipe}")
        values[key] = value = tuple(value) if isinstance(value, list) else value
        _check_type(key, value, f"{value!r} in the recipe {recipe}")
    return Config().replace(**values)


def default_options(recipe: str | None, data: str | None) -> Config:
    """Return the options of a recipe, or without one those of the default recipe.

    For data of one's own, the latter leave the number of classes, and what depends on it, to the data.

    Args:
        recipe: the recipe that is given.
        data: the data that are given.

    Raises:
        ConfigError: the recipe is invalid.
    """
    config = load_recipe(recipe or DEFAULT_RECIPE)
    if not is_own_data(recipe, data):
        return config
    general = Config().options()
    return config.replace(**{name: general[name] for name in Config.marked(Mark.DATASET)})


def is_own_data(recipe: str | None, data: str | None) -> bool:
    """Return whether the data are given, but no recipe: the run then has the name of the data."""
    return recipe is None and data not in (None, load_recipe(DEFAULT_RECIPE).data.data)


def as_in_paper(config: Config) -> Config:
    """Return the options with the paper's settings where recipes depart from them, as --preset paper does."""
    paper = Config().options()
    return config.replace(**{name: paper[name] for name in Config.marked(Mark.DEPARTURE)})


def configure(recipe: str | Config | None, options: dict[str, Any]) -> Config:
    """The configuration of a recipe, or a configuration, with some options replaced. Lists become tuples, and paths texts.

    Without a recipe it is that of the command line without --recipe. The name is empty if the run has that of its data.

    Raises:
        ConfigError: the recipe is invalid, or an option does not exist or has a value that is not valid.
    """
    if not isinstance(recipe, str | Config | None):
        raise ConfigError("recipe", "a recipe's name, a .toml file or a Config", repr(recipe))
    data = _plain(options.get("data"))
    if "data" in options:  # before it is compared, as with arrays
        _check_type("data", data, repr(data))
    config = recipe if isinstance(recipe, Config) else default_options(recipe, data)
    for key in options:
        if key not in HINTS:
            raise ConfigError(key, "the name of an option", repr(key))
    if options.get("preset") == "paper":
        config = as_in_paper(config)
    given = config.options() | options if isinstance(recipe, Config) else options
    values = {key: _plain(value) for key, value in given.items()}
    for key, value in values.items():
        _check_type(key, value, repr(value))
    config = config.replace(**values)
    if config.run.name or isinstance(recipe, Config) or is_own_data(recipe, data):
        return config
    return config.replace(name=Path(config.run.recipe).stem)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return str(value) if isinstance(value, Path) else value


def parse_value(option: str, text: str) -> Any:
    """The value of an option from text, in the syntax of recipes except that words need no quotes.

    Raises:
        ConfigError: there is no such option, or the value has another type.
    """
    if option not in HINTS:
        raise ConfigError("vary", "the name of an option", repr(option))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if HINTS[option] is float and type(value) is int:
        value = float(value)
    _check_type(option, value, repr(text))
    return value


def _check_type(option: str, value: Any, got: str) -> None:
    hint = HINTS[option]
    try:
        typeguard.check_type(value, hint)
    except typeguard.TypeCheckError as error:
        expected = hint.__name__ if hint in (bool, int, float, str) else str(hint).replace("typing.", "")
        raise ConfigError(option, expected, f"{got} ({error})") from None
