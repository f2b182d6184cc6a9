"""Recipes: TOML files of options, keyed by their names. This module reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_type_hints

import typeguard

from ..config import Config, ConfigError
from ..files import TextError, read_text

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
        path = Path(recipe) if recipe.endswith(".toml") else FOLDER / f"{recipe}.toml"
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


def configure(recipe: str, options: dict[str, Any]) -> Config:
    """The configuration of a recipe with some options replaced.

    Raises:
        ConfigError: the recipe is invalid, or an option does not exist or has a value that is not valid.
    """
    config = load_recipe(recipe)
    for key, value in options.items():
        if key not in HINTS:
            raise ConfigError(key, "the name of an option", repr(key))
        _check_type(key, value, repr(value))
    config = config.replace(**options)
    return config if config.run.name else config.replace(name=Path(recipe).stem)


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
