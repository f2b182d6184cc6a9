"""`python -m train ablation`: the same run for several seeds, and a table of means over them.

Each seed is a run of its own, `runs/<name>/seed-<s>/`, so that what is finished is not done again: the same command goes on
where it stopped, from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import processes
from .config import Config, ConfigError
from .display import say
from .groups import GROUPS
from .methods import TITLES
from .run import start
from .runfiles import write_aside

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ablation(Config):
    """Every option of a run, and for which seeds; --seed and --resume are its own to set."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds, each a run of all methods."""


def ablate(ablation: Ablation, console: Console) -> int:
    """Run every seed that is not finished, and write `runs/<name>/table.md`.

    Raises:
        ConfigError: an option that cannot be, or differs from what an earlier seed was run with.
    """
    if not ablation.seeds or len(set(ablation.seeds)) != len(ablation.seeds):
        raise ConfigError("seeds", "one seed at least, each once", repr(ablation.seeds))
    folder = Path(ablation.runs) / ablation.name
    results: dict[int, list[Result]] = {}
    shared = {field.name: getattr(ablation, field.name) for field in dataclasses.fields(Config)}
    for seed in ablation.seeds:
        say(console, f"seed {seed}")
        own = {"runs": str(folder), "name": f"seed-{seed}", "seed": seed, "resume": True}
        results[seed] = start(Config(**shared | own), console)
        text = table(results, ablation)
        if processes.rank():
            continue
        write_aside(folder / "table.md", lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    say(console, text)
    say(console, f"written to {folder / 'table.md'}")
    return 0


def table(results: dict[int, list[Result]], config: Config) -> str:
    """Markdown: mean ± standard deviation over the seeds of each method's accuracies, and the usage of its slots."""
    rows: dict[str, list[Result]] = {}
    for found in results.values():
        for result in found:
            title = TITLES[result["method"]]
            rows.setdefault(title, []).append(result)
            for name, accuracy in result.get("accuracy_of", {}).items():
                rows.setdefault(f"{title}: {name}", []).append(
                    {"accuracy": accuracy, "images": result["images"]}
                )
    lines = [
        f"Test accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, results))}; "
        f"data {Path(config.data).name}, split rule {config.split_rule}.",
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
