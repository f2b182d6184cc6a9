"""Training, which is the program without a command: a run from its options to its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .. import distributed
from ..cli import parse, program
from ..config import Config
from ..console import messages_of, print_json, say
from ..recipes import read_recipe, recipe_names
from ..run import start
from ..unused_options import unused_options


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """The options of a run and of its output."""

    #: Write one JSON object to standard output, the results; messages go to standard error.
    json: bool = False


def train(args: list[str], console: Console, commands: Mapping[str, str]) -> int:
    """Train all methods and write the report; see `run.start`. `commands` holds a line for --help per command."""
    options = parse(args, Training, program(), _description(commands))
    config, messages = Config().replace(**options.options()), messages_of(console, as_json=options.json)
    for unused in unused_options([config], args):
        say(messages, f"warning: {unused}")
    results = start(config, messages)
    if options.json and distributed.rank() == 0:
        folder = Path(options.run.runs) / options.run.name
        for result in results:
            result["model"] = str(folder / f"model-{result['method']}.safetensors")
        print_json({"folder": str(folder), "results": results})
    return 0


def _description(commands: Mapping[str, str]) -> str:
    """The text above the options of a run in --help."""
    paragraphs = [
        "Trains GistNet in two stages on a long-tailed dataset, and a plain softmax classifier for comparison.",
        f"Commands, such as `{program('predict')}`, each with a --help of its own:",
        *(f"{name}: {line}" for name, line in commands.items()),
        "Recipes:",
        *(f"{name}: {read_recipe(name).get('description', '')}" for name in recipe_names()),
    ]
    return "\n\n".join(paragraphs)
