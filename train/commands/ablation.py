"""`python -m train ablation`: the same run for several seeds and values of options, and a table of means over the seeds.

Each is a run of its own, `runs/<name>/seed-<s>/` or `runs/<name>/<option>=<value>/seed-<s>/`, so that what is finished is
not done again: the same command goes on where it stopped, from the last checkpoint. First stages that runs have in common
are trained once (`runs/<name>/first-stages/`).
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import distributed
from ..cli import check
from ..config import Config, ConfigError
from ..console import say
from ..files import write_atomically
from ..methods import TITLES
from ..options import Mark
from ..recipes import parse_value
from ..run import start
from ..shot_groups import GROUPS

Result = dict[str, Any]
Variant = dict[str, Any]  # options and their values


@dataclass(frozen=True, kw_only=True)
class Ablation(Config):
    """Every option of a run, for which seeds, and which options to vary; --seed and --resume are its own to set."""

    #: The seeds, each a run of all methods.
    seeds: tuple[int, ...] = (0, 1, 2)
    #: OPTION=VALUE,VALUE,…: a run of each seed for each of the values, such as num-displacements=2,4,8,16; of
    #: several options, for each combination.
    vary: tuple[str, ...] = ()


def ablate(ablation: Ablation, console: Console) -> int:
    """Run everything that is not finished, and write `runs/<name>/table.md`.

    Raises:
        ConfigError: an option that cannot be, or differs from what an earlier seed was run with.
    """
    if not ablation.seeds or len(set(ablation.seeds)) != len(ablation.seeds):
        raise ConfigError("seeds", "one seed at least, each once", repr(ablation.seeds))
    folder = Path(ablation.run.runs) / ablation.run.name
    base = Config().replace(**ablation.options())
    variants = variants_of(ablation.vary)
    for variant in variants:
        check(base.replace(**variant))
    results: dict[str, dict[int, list[Result]]] = {label(variant): {} for variant in variants}
    text = ""
    # A seed of every variant before the next seed: what there is can be compared at any time.
    for seed, variant in itertools.product(ablation.seeds, variants):
        name = label(variant)
        say(console, f"seed {seed}{name and ', '}{name}")
        own = {"runs": str(folder / name), "name": f"seed-{seed}", "seed": seed, "resume": True}
        config = base.replace(**variant | own)
        results[name][seed] = start(config, console, folder / "first-stages")
        text = table(results, ablation)
        if distributed.rank() == 0:
            write_atomically(folder / "table.md", lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    say(console, text)
    say(console, f"written to {folder / 'table.md'}")
    return 0


def variants_of(vary: tuple[str, ...]) -> list[Variant]:
    """Every combination of the values; one that changes nothing if there are none.

    Raises:
        ConfigError: not OPTION=VALUE,VALUE,…, an option that is none or is given twice, or a value that is none of its.
    """
    values: dict[str, list[Any]] = {}
    for words in vary:
        option, _, listed = words.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not listed or name in values:
            raise ConfigError("vary", "OPTION=VALUE,VALUE,… of each option once", repr(words))
        if name in Config.marked(Mark.IDENTITY):
            raise ConfigError("vary", "an option that a run's outcome depends on", repr(option))
        values[name] = [parse_value(name, value) for value in listed.split(",")]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def label(variant: Variant) -> str:
    """`num-displacements=8, displacement-lr=0.1`; empty for one that changes nothing."""
    return ", ".join(f"{name.replace('_', '-')}={value}" for name, value in variant.items())


def table(results: dict[str, dict[int, list[Result]]], config: Config) -> str:
    """Markdown: mean ± standard deviation over the seeds of each method's accuracies, and the usage of its slots.

    Args:
        results: label of a variant -> seed -> results of all methods.
        config: for what all have in common.
    """
    rows: dict[str, list[Result]] = {}
    for variant, by_seed in results.items():
        for result in itertools.chain.from_iterable(by_seed.values()):
            title = TITLES[result["method"]] + (variant and f", {variant}")
            rows.setdefault(title, []).append(result)
            for name, accuracy in result.get("accuracy_of", {}).items():
                rows.setdefault(f"{title}: {name}", []).append(
                    {"accuracy": accuracy, "images": result["images"]}
                )
    seeds = dict.fromkeys(itertools.chain.from_iterable(results.values()))
    lines = [
        f"Test accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; "
        f"data {Path(config.data.data).name}, split rule {config.run.split_rule}.",
        "",
        "| | overall | " + " | ".join(GROUPS) + " | slot usage, % | image passes |",
        "|---|" + "---|" * (len(GROUPS) + 3),
    ]
    for title, found in rows.items():
        cells = [spread([r["accuracy"][column] for r in found]) for column in ("overall", *GROUPS)]
        cells += [usage(found), f"{found[0]['images']:,}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float | None]) -> str:
    """`48.3 ± 0.2` of shares, in percent."""
    if any(value is None for value in values):
        return "–"
    percent = [100 * value for value in values if value is not None]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.fmean(percent):.1f}{deviation}"


def usage(found: list[Result]) -> str:
    """Mean share of each slot, `26 / 23 / 18`; nothing where there is one slot."""
    shares = [result["slot_usage"] for result in found if len(result.get("slot_usage", [])) > 1]
    return " / ".join(f"{100 * statistics.fmean(s):.0f}" for s in zip(*shares, strict=True))
