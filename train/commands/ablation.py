"""`python -m train ablation`: runs for several seeds and values of options, and a table of means over the seeds.

Each run has its own folder, `runs/<name>/seed-<s>/` or `runs/<name>/<option>=<value>/seed-<s>/`. The same command
continues an interrupted ablation: it skips finished runs and resumes the last run from its checkpoint. A command with
other seeds or values adds their runs to those of the folder, and the table shows all of them. First stages that runs share
are trained once (`runs/<name>/first-stages/`).
"""

from __future__ import annotations

import functools
import itertools
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import distributed
from ..cli import check
from ..config import Config, ConfigError
from ..console import printable, say
from ..files import write_atomically
from ..methods import TITLES
from ..options import Mark
from ..recipes import load_recipe, parse_value
from ..report.html import read_records
from ..run import start
from ..shot_groups import GROUPS
from ..training.lock import locked
from ..training.stopping import raise_if_stopped

Result = dict[str, Any]
Results = dict[str, dict[int, list[Result]]]  # label of a variant -> seed -> results of all methods
Variant = dict[str, Any]  # the varied options and their values

UNCOMPARED = Mark.IDENTITY | Mark.CHANGEABLE  # options that differ between runs which one table may hold


@dataclass(frozen=True, kw_only=True)
class Ablation(Config):
    """Trains runs for several seeds and values of options, and writes a table of means. Sets --seed and --resume itself."""

    #: Seeds, with a run of all methods for each.
    seeds: tuple[int, ...] = (0, 1, 2)
    #: OPTION=VALUE,VALUE,…: a run per seed and value, for example num-displacements=2,4,8,16. With several
    #: options, a run per combination of values.
    vary: tuple[str, ...] = ()


def ablate(ablation: Ablation, console: Console) -> int:
    """Complete all runs and write `runs/<name>/table.md`.

    Raises:
        ConfigError: an invalid option, or an option that differs from an earlier run in the same folder.
    """
    if not ablation.seeds or len(set(ablation.seeds)) != len(ablation.seeds):
        raise ConfigError("seeds", "at least one seed, each once", repr(ablation.seeds))
    folder = Path(ablation.run.runs) / ablation.run.name
    base = Config().replace(**ablation.options())
    variants = variants_of(ablation.vary)
    for variant in variants:
        check(base.replace(**variant))
    with locked(folder):
        return _complete(ablation, base, variants, folder, console)


def _complete(
    ablation: Ablation, base: Config, variants: list[Variant], folder: Path, console: Console
) -> int:
    results: Results = {label(variant): {} for variant in variants}
    for name, by_seed in distributed.broadcast_from_rank0(lambda: earlier_results(folder, base)).items():
        results.setdefault(name, {}).update(by_seed)
    text = ""
    # All variants of a seed come before the next seed, so that variants can be compared at any time.
    for seed, variant in itertools.product(ablation.seeds, variants):
        raise_if_stopped()  # after the last method of the last run
        name = label(variant)
        say(console, f"seed {seed}{name and ', '}{name}")
        place = {"runs": str(folder / name), "name": f"seed-{seed}", "seed": seed, "resume": True}
        config = base.replace(**variant | place)
        results[name][seed] = start(config, console, folder / "first-stages")
        text = table(results, ablation)
        if distributed.rank() == 0:
            write = functools.partial(Path.write_text, data=text, encoding="utf-8")
            write_atomically(folder / "table.md", write)
    for line in text.splitlines():
        say(console, line)
    say(console, f"written to {folder / 'table.md'}")
    return 0


def earlier_results(folder: Path, base: Config) -> Results:
    """Return the results of the finished runs in the folder.

    Raises:
        ConfigError: an earlier run has another value of an option that it does not vary, so the runs are not comparable.
    """
    results: Results = {}
    for config_file in sorted(folder.rglob("seed-*/config.toml")):
        run, earlier = config_file.parent, load_recipe(str(config_file))
        name = run.parent.relative_to(folder).as_posix().removeprefix(".")
        varied = {pair.partition("=")[0].replace("-", "_") for pair in name.split(", ")}
        now, before = base.recorded(), earlier.recorded()
        for option in sorted(now.keys() - varied - {"methods", "device"}):
            from_data = now[option] is None and option in Config.marked(Mark.DATASET)
            if now[option] != before[option] and not from_data and option not in Config.marked(UNCOMPARED):
                expected = f"{before[option]!r} as in the earlier runs in {folder}"
                raise ConfigError(option, f"{expected}, or another --name", repr(now[option]))
        found = [record for record in read_records(run) if record["event"] == "result"]
        if len(found) == len(earlier.method.methods):
            results.setdefault(name, {})[earlier.run.seed] = found
    return results


def variants_of(vary: tuple[str, ...]) -> list[Variant]:
    """All combinations of the values; a single empty combination if nothing varies.

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
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def label(variant: Variant) -> str:
    """The name of a variant, such as `num-displacements=8, displacement-lr=0.1`."""
    return ", ".join(f"{name.replace('_', '-')}={value}" for name, value in variant.items())


def table(results: Results, config: Config) -> str:
    """Return a Markdown table: mean ± standard deviation of accuracies over seeds, and mean slot usage, per method.

    Args:
        results: label of a variant -> seed -> results of all methods.
        config: the options that all runs share.
    """
    rows: dict[str, list[Result]] = {}
    seeds = list(dict.fromkeys(itertools.chain.from_iterable(results.values())))
    for variant, by_seed in results.items():
        if by_seed.keys() != set(seeds):
            variant = ", ".join(
                [*([variant] if variant else []), f"seeds {' '.join(map(str, by_seed))} only"]
            )
        for result in itertools.chain.from_iterable(by_seed.values()):
            title = TITLES[result["method"]] + (variant and f", {markdown(variant)}")
            rows.setdefault(title, []).append(result)
            for name, accuracy in result.get("accuracy_of", {}).items():
                rows.setdefault(f"{title}: {name}", []).append(
                    {"accuracy": accuracy, "images": result["images"]}
                )
    lines = [
        f"Test accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; "
        f"data {markdown(Path(config.data.data).name)}, split rule {config.run.split_rule}.",
        "",
        "| | overall | " + " | ".join(GROUPS) + " | slot usage, % | image passes |",
        "|---|" + "---|" * (len(GROUPS) + 3),
    ]
    for title, found in rows.items():
        cells = [spread([r["accuracy"][column] for r in found]) for column in ("overall", *GROUPS)]
        cells += [usage(found), f"{found[0]['images']:,}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def markdown(name: str) -> str:
    """Return a name as plain text of a Markdown table. An underscore inside a word is no markup."""
    return re.sub(r"([\\`*|<\[$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(name))


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation of fractions, in percent."""
    if any(value is None for value in values):
        return "–"
    percent = [100 * value for value in values if value is not None]
    deviation = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.fmean(percent):.1f}{deviation}"


def usage(found: list[Result]) -> str:
    """Mean usage of each slot in percent, such as `26 / 23 / 18`; empty for methods with one slot."""
    shares = [result["slot_usage"] for result in found if len(result.get("slot_usage", [])) > 1]
    return " / ".join(f"{100 * statistics.fmean(s):.0f}" for s in zip(*shares, strict=True))
