"""The runs of an ablation: combinations of values of options, or the rows of a table of the paper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..config import Config, ConfigError, MethodName
from ..options import Mark, label
from ..recipes import parse_value
from ..report.paper import PaperTable


@dataclass
class Variant:
    """A run per seed: the options that the run sets, and its methods."""

    options: dict[str, Any]
    methods: tuple[MethodName, ...]

    @property
    def label(self) -> str:
        """The name of the variant; empty if it sets no option."""
        return label(self.options)


def varied(vary: tuple[str, ...], methods: tuple[MethodName, ...]) -> list[Variant]:
    """Return a variant per combination of values; a single variant without options if nothing varies.

    Raises:
        ConfigError: an argument is not OPTION=VALUE,VALUE,…, names an unknown option or an option twice, or has an invalid
            value.
    """
    values: dict[str, list[Any]] = {}
    for words in vary:
        option, _, listed = words.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not listed or name in values:
            raise ConfigError("vary", "OPTION=VALUE,VALUE,…, each option once", repr(words))
        if name in Config.marked(Mark.IDENTITY):
            raise ConfigError(
                "vary", "an option that influences results and is not set by the ablation", repr(option)
            )
        values[name] = [parse_value(name, value) for value in listed.split(",")]
        if len(set(values[name])) < len(values[name]):
            raise ConfigError("vary", "each value once", repr(words))
    combinations = itertools.product(*values.values())
    return [Variant(dict(zip(values, chosen, strict=True)), methods) for chosen in combinations]


def tabled(table: PaperTable, base: Config) -> list[Variant]:
    """Return the variants of a table's rows: rows with the same options share a run.

    Args:
        table: the table.
        base: the options of all rows, beside those that a row sets.
    """
    found: dict[str, Variant] = {}
    for row in table.rows:
        if row.method is not None:
            variant = Variant(row.variant(base), ())
            variant = found.setdefault(variant.label, variant)
            variant.methods += (row.method,)
    return list(found.values())
