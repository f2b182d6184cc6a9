"""`python -m train ablation`: runs for several seeds, and values of options or the rows of a table of the paper, and a table
of means over the seeds.

Each run has its own folder, `runs/<name>/seed-<s>/` or `runs/<name>/<option>=<value>/seed-<s>/`. The same command
continues an interrupted ablation: it skips finished runs and resumes the last run from its checkpoint. A command with
other seeds, values or tables adds their runs to those of the folder, and the table shows all of them. First stages that runs
share are trained once (`runs/<name>/first-stages/`).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from .. import distributed
from ..cli import check, parse, program, times_given
from ..config import Config, ConfigError, MethodName
from ..console import messages_of, print_json, say
from ..files import write_atomically
from ..options import Mark
from ..recipes import load_recipe
from ..report.html import read_records
from ..report.markdown import COLUMNS, Results, mean_and_deviation, table
from ..report.paper import TABLES
from ..run import start
from ..training.lock import locked
from ..training.stopping import raise_if_stopped
from ..unused_options import unused_options
from .variants import Variant, tabled, varied

UNCOMPARED = Mark.IDENTITY | Mark.CHANGEABLE  # options that differ between runs which one table may hold


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """The options of the command beside those of a run."""

    #: One run of all methods for each of these seeds.
    seeds: tuple[int, ...] = (0, 1, 2)
    #: OPTION=VALUE,VALUE,…: one run per seed and value, for example num-displacements=2,4,8,16. With several
    #: options, one run per combination of values.
    vary: tuple[str, ...] = ()
    #: Train the rows of this table of the paper, in its order, in place of --methods and --vary. 1: ImageNet-LT and
    #: Places-LT. 2: iNaturalist 2018. 3: the ablation of the two streams, the displacements and their transforms.
    #: Any data will do. If --data is the whole dataset of the table, without samples held out, the paper's figures stand
    #: beside the results.
    table: Literal[1, 2, 3] | None = None
    #: Write one JSON object to standard output: the accuracies of each line of the table by seed, with means and standard deviations. Messages go to standard error.
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Ablation(Config, AblationOptions):
    """Trains one run per seed and value of --vary, or the rows of a table of the paper, and writes a table of means.
    Sets --seed and --resume itself."""


def ablate(args: list[str], console: Console) -> int:
    """Complete all runs and write `runs/<name>/table.md`.

    Args:
        args: the words of the command line.
        console: the console for messages and progress.

    Raises:
        ConfigError: an invalid option, or an option that differs from an earlier run in the same folder.
    """
    ablation = parse(args, Ablation, program("ablation"), own=AblationOptions)
    if not ablation.seeds or len(set(ablation.seeds)) != len(ablation.seeds):
        raise ConfigError("seeds", "at least one seed, each once", repr(ablation.seeds))
    for option in ("methods", "vary") if ablation.table else ():
        if times_given(option, args):
            raise ConfigError(
                "table", f"no --{option} beside it, as the table has its own rows", ablation.table
            )
    folder = Path(ablation.run.runs) / ablation.run.name
    base = Config().replace(**ablation.options())
    if ablation.table:
        variants = tabled(TABLES[ablation.table], base)
    else:
        variants = varied(ablation.vary, base.method.methods)
    runs = [base.replace(**variant.options | {"methods": variant.methods}) for variant in variants]
    for config in runs:
        check(config)
    for seed in ablation.seeds:
        base.replace(seed=seed)  # raises before the runs of the seeds before it
    messages = messages_of(console, as_json=ablation.json)
    for unused in unused_options(
        runs, [*args, *(f"--{words.removeprefix('--')}" for words in ablation.vary)]
    ):
        say(messages, f"warning: {unused}")
    with locked(folder):
        return _complete(ablation, base, variants, folder, messages)


def _complete(
    ablation: Ablation, base: Config, variants: list[Variant], folder: Path, console: Console
) -> int:
    results: Results = {variant.label: {} for variant in variants}
    for name, by_seed in distributed.broadcast_from_rank0(lambda: earlier_results(folder, base)).items():
        results.setdefault(name, {}).update(by_seed)
    paper = TABLES[ablation.table] if ablation.table else None
    text = ""
    # All variants of a seed come before the next seed, so that variants can be compared at any time.
    for seed, variant in itertools.product(ablation.seeds, variants):
        raise_if_stopped()  # after the last method of the last run
        name = variant.label
        say(console, f"seed {seed}{name and ', '}{name}")
        place = {"runs": str(folder / name), "name": f"seed-{seed}", "seed": seed, "resume": True}
        methods = variant.methods
        if paper:
            run = folder / name / f"seed-{seed}"
            methods = distributed.broadcast_from_rank0(functools.partial(with_earlier, run, methods))
        config = base.replace(**variant.options | place, methods=methods)
        results[name][seed] = start(config, console, folder / "first-stages")
        text = table(results, base, paper)
        if distributed.rank() == 0:
            write = functools.partial(Path.write_text, data=text, encoding="utf-8")
            write_atomically(folder / "table.md", write)
    if ablation.json and distributed.rank() == 0:
        print_json({"table": str(folder / "table.md"), "rows": rows_of(results)})
    for line in text.splitlines():
        say(console, line)
    say(console, f"written to {folder / 'table.md'}")
    return 0


def rows_of(results: Results) -> list[dict[str, Any]]:
    """Return the lines of the table as plain values: fractions by group of classes, None for a group without classes."""
    found: dict[tuple[str, str], dict[int, dict[str, float | None]]] = {}
    for variant, by_seed in results.items():
        for seed, run in by_seed.items():
            for result in run:
                found.setdefault((variant, result["method"]), {})[seed] = result["accuracy"]
    rows = []
    for (variant, method), accuracies in found.items():
        spreads = {
            name: mean_and_deviation([accuracy[name] for accuracy in accuracies.values()]) for name in COLUMNS
        }
        rows.append(
            {
                "variant": variant,
                "method": method,
                "seeds": accuracies,
                "mean": {name: mean for name, (mean, _) in spreads.items()},
                "deviation": {name: deviation for name, (_, deviation) in spreads.items()},
            }
        )
    return rows


def with_earlier(run: Path, methods: tuple[MethodName, ...]) -> tuple[MethodName, ...]:
    """Return the methods of a run that has begun, and those of `methods` that it lacks: tables share runs."""
    config_file = run / "config.toml"
    earlier = load_recipe(str(config_file)).method.methods if config_file.exists() else ()
    return tuple(dict.fromkeys(earlier + methods))


def earlier_results(folder: Path, base: Config) -> Results:
    """Return the results of the finished runs in the folder.

    Raises:
        ConfigError: an earlier run has another value of an option that it does not vary, so the runs are not comparable.
    """
    results: Results = {}
    for config_file in sorted(folder.rglob("seed-*/config.toml")):
        run, earlier = config_file.parent, load_recipe(str(config_file))
        name = run.parent.relative_to(folder).as_posix().removeprefix(".")
        varied_options = {pair.partition("=")[0].replace("-", "_") for pair in name.split(", ")}
        now, before = base.recorded(), earlier.recorded()
        for option in sorted(now.keys() - varied_options - {"methods", "device"}):
            from_data = now[option] is None and option in Config.marked(Mark.DATASET)
            if now[option] != before[option] and not from_data and option not in Config.marked(UNCOMPARED):
                expected = f"{before[option]!r} as in the earlier runs in {folder}"
                raise ConfigError(option, f"{expected}, or another --name", repr(now[option]))
        try:
            records = read_records(run)
        except (FileNotFoundError, ValueError):
            continue  # as of a run that is not finished, which writes them again when it goes on
        found = [record for record in records if record["event"] == "result"]
        if len(found) == len(earlier.method.methods):
            results.setdefault(name, {})[earlier.run.seed] = found
    return results
