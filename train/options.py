"""The base classes of options: errors, marks, and sections that validate their own fields."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .console import printable

Self = TypeVar("Self", bound="Sections")


class ConfigError(Exception):
    """An invalid option. The message names the option, what was expected and what came."""

    def __init__(self, option: str, expected: str, got: object) -> None:
        super().__init__(printable(f"--{option.replace('_', '-')}: expected {expected}, got {got}"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how the error is copied to other processes: by its message, as it does not keep the arguments."""
        return _with_message, (type(self), str(self))


def _with_message(kind: type[ConfigError], message: str) -> ConfigError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class InvalidData(ConfigError):
    """Data that cannot be used. The message names the option at fault, which is --data if the error names none."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        Exception.__init__(self, printable(text if text.startswith("--") else f"--data: {text}"))


class Mark(enum.Flag):
    """Properties of options, for code that handles every option."""

    NONE = 0
    UNRECORDED = enum.auto()
    """Does not influence results: not written to config.toml and not compared when a run is resumed."""
    CHANGEABLE = enum.auto()
    """May change when a run is resumed: where the data lies (its content is compared), how often the run is saved, and how
    the same steps are launched."""
    SECOND_STAGE = enum.auto()
    """Does not influence the first stage, beside the options marked CHANGEABLE."""
    DEPARTURE = enum.auto()
    """Recipes depart from the paper here; --preset paper restores the default."""
    DATASET = enum.auto()
    """Describes the dataset of a recipe: other data than the default recipe's brings its own value."""
    IDENTITY = enum.auto()
    """Identifies a run, so that an ablation cannot vary it."""


def label(options: dict[str, Any]) -> str:
    """Return options and their values as text, such as `num-displacements=8, displacement-lr=0.1`."""
    return ", ".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())


def option(default: Any, marks: Mark) -> Any:
    """A dataclass field with a default and marks."""
    return field(default=default, metadata={"marks": marks})


@dataclass(frozen=True, kw_only=True)
class Section:
    """Options that belong together."""

    marks: ClassVar[Mark] = Mark.NONE  # marks of all options of the section

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ConfigError(name, expected, repr(getattr(self, name)))

    def _expect_at_least(self, bound: int, *names: str) -> None:
        """Refuse values below `bound` and values that are not finite; None is a valid value."""
        for name in names:
            value = getattr(self, name)
            expected = f"a finite number, at least {bound}" if value == math.inf else f"at least {bound}"
            self._expect(name, value is None or bound <= value < math.inf, expected)

    def _expand_home(self, *names: str) -> None:
        """Replace a leading ~ in paths by the home folder. A shell does so in words alone: not in recipes and calls of `fit`."""
        for name in names:
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))

    def _expect_above_0(self, *names: str) -> None:
        """Refuse 0, negative numbers and values that are not finite; None is a valid value."""
        for name in names:
            value = getattr(self, name)
            expected = "a finite number above 0" if value == math.inf else "a number above 0"
            self._expect(name, value is None or 0 < value < math.inf, expected)


@dataclass(frozen=True, kw_only=True)
class Sections:
    """Base class of a command's options: sections, and options of its own beside them."""

    @classmethod
    def sections(cls) -> Iterator[tuple[str, type[Section]]]:
        """Names and classes of the sections."""
        for part in dataclasses.fields(cls):
            if isinstance(part.default_factory, type) and issubclass(part.default_factory, Section):
                yield part.name, part.default_factory

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options of all sections by name."""
        return {part.name: part for _, section in cls.sections() for part in dataclasses.fields(section)}

    @classmethod
    def marked(cls, marks: Mark) -> set[str]:
        """Names of the options that have one of `marks`."""
        return {
            part.name
            for _, section in cls.sections()
            for part in dataclasses.fields(section)
            if marks & (section.marks | part.metadata.get("marks", Mark.NONE))
        }

    def options(self) -> dict[str, Any]:
        """Values of the options of all sections by name."""
        return {key: value for name, _ in self.sections() for key, value in vars(getattr(self, name)).items()}

    def replace(self: Self, **options: Any) -> Self:
        """Return a copy with some options replaced, in any section."""
        changed: dict[str, Section] = {}
        for name, section in self.sections():
            names = options.keys() & {part.name for part in dataclasses.fields(section)}
            changed[name] = dataclasses.replace(
                getattr(self, name), **{key: options.pop(key) for key in names}
            )
        if options:
            raise TypeError(f"options: expected names of options, got {', '.join(options)}")
        return dataclasses.replace(self, **changed)
