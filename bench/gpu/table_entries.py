"""The entries of the backends' tables that the selection rule fills: lines to paste, with the result as their source.

`python -m bench.gpu.table_entries bench/results/<name>.json` prints them for a result; `--day` prints them at its end. For each
setting that the measured variants of a backend dispute, an entry holds the winner's value, or the table's if the winner
does not set it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import selection_rule, settings
from .variants import KINDS, TABLE

#: Precision -> kind of product in the table.
PRODUCTS = {"bf16": "half", "float32": "ieee", "tf32": "tf32"}
#: Settings that are lists of tiles in the table: the field of a tile that is halved in float32.
TILES = {"forward": "dims", "centers": "rows"}
BACKEND = "triton"


def lines(document: dict[str, Any], source: str = "") -> Iterator[str]:
    """Yield the entries, and a comment per entry that a person must complete.

    Args:
        document: the results of a session.
        source: the file that holds them; empty for `bench/results/<gpu>-<date>.json`.
    """
    source = source or _source(document)
    try:
        tables = importlib.import_module(f"gistops.backends.{BACKEND}.tile_tables")
    except ImportError as error:
        yield f"# no table of {BACKEND}: {error}"
        return
    target = _target(document)
    entries: dict[
        str, str
    ] = {}  # a later kind replaces an earlier one: the loss's step is what training runs
    for precision, product in PRODUCTS.items():
        for kind in KINDS:
            pick = selection_rule.choose(document, precision, kind, BACKEND)
            if "winner" not in pick:
                continue
            measured = f"measured: {source}, {precision} {kind}"
            chosen = TABLE[pick["winner"]].settings
            names = [name for variant in pick["means"] for name in TABLE[variant].settings]
            for name in dict.fromkeys((*chosen, *names)):
                place = settings.SETTINGS[name].place
                key = f"{place} {product}"
                entries.pop(key, None)
                entries[key] = _entry(tables, place, chosen.get(name), target, product, measured)
            for size, best in pick.get("but", {}).items():
                entries[f"{precision} {kind} {size}"] = (
                    f"# {precision} {kind} at {size}: {best['variant']} ({best['ratio']:.2f})"
                )
    yield from entries.values()


def _entry(tables: Any, place: str, value: Any, target: str, product: str, measured: str) -> str:
    if "." in place:
        module, attribute = place.rsplit(".", 1)
        current = getattr(importlib.import_module(f"gistops.{module}"), attribute)
        return f"# gistops.{module}: {attribute} = {current if value is None else value}  # {measured}"
    if place in TILES:
        tiles = tables.choice(place, target, product)
        if value is not None:
            first = tables.Config(*value)
            if product != "half":
                first = replace(first, **{TILES[place]: getattr(first, TILES[place]) // 2})
            tiles = (first, *(tile for tile in tiles if tile != first))
        value = tiles
    elif value is None:
        value = tables.choice(place, target, product)
    text = repr(value).replace("'", '"')
    return f'("{place}", "{target}", "{product}"): tile_tables.Choice({text}, "{measured}"),'.replace(
        "tile_tables.", ""
    )


def _source(document: dict[str, Any]) -> str:
    """Return the name under which a result is committed."""
    header = document.get("header", {})
    name = "-".join(str(header.get("gpu", "unknown")).lower().split())
    return f"bench/results/{name}-{str(header.get('date', 'undated'))[:10]}.json"


def _target(document: dict[str, Any]) -> str:
    """Return the table's name of the device that was measured."""
    capability = str(document.get("header", {}).get("compute capability") or "")
    if not capability:
        return "amd"
    return "hopper" if capability.split(".")[0] in ("9", "10") else "ampere"


def load(path: Path) -> dict[str, Any]:
    """Return the results in a file. A variant was a form in files before its renaming."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").replace('"forms":', '"variants":'))
    return document


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for line in lines(load(Path(argument)), argument):
            print(line)
