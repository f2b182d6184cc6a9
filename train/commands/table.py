"""The commands beside training: names, options, help and shell completion."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console

from ..cli import parse, parse_command, program
from .ablation import Ablation, ablate
from .doctor import Doctor, examine
from .evaluate import Evaluate, evaluate
from .export import Export, export
from .features import Features, extract
from .predict import Predict, predict
from .report import Report, compare
from .training import Training


@dataclass(frozen=True)
class Completion:
    """Prints a script that completes commands and options of gistops-train in a shell."""

    #: The shell.
    shell: tyro.conf.Positional[Literal["bash", "zsh"]]


#: Lines after tyro's script that complete paths where the script completes nothing, which in bash is an empty word.
FILES = {
    "bash": "_gistops_train() { _tyro_gistops_train; [[ ${COMPREPLY[0]} ]] || COMPREPLY=(); }\n"
    "complete -o default -F _gistops_train gistops-train",
    "zsh": "(( ! $? )) || _files",
}


@dataclass(frozen=True)
class Command:
    """A command: its options, whose docstring begins with the line for --help, and the function that runs it."""

    options: type
    run: Callable[[list[str], Console], int]

    @property
    def line(self) -> str:
        """The first sentence of the description."""
        text = (inspect.getdoc(self.options) or "").replace("\n", " ")
        return text.partition(". ")[0].rstrip(".") + "."


def complete(args: list[str], console: Console) -> int:
    """Print the script of a shell's completion: tyro's, which completes commands and options, and lines that complete paths."""
    shell = parse_command(args, Completion, "completion").shell
    named = tuple(Annotated[each.options, tyro.conf.subcommand(name)] for name, each in COMMANDS.items())
    command: Any = Union[named]  # noqa: UP007  # of a tuple
    everything = dataclasses.make_dataclass(
        "everything", [("command", command)], bases=(Training,), frozen=True, kw_only=True
    )
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with contextlib.suppress(SystemExit):
        tyro.cli(everything, prog="gistops-train", args=["--tyro-print-completion", shell], config=settings)
    print(FILES[shell])
    return 0


#: Commands by name, in the order of their use.
COMMANDS = {
    "doctor": Command(Doctor, examine),
    "predict": Command(Predict, predict),
    "evaluate": Command(Evaluate, evaluate),
    "export": Command(Export, export),
    "report": Command(Report, compare),
    "features": Command(
        Features, lambda args, console: extract(parse(args, Features, program("features")), console)
    ),
    "ablation": Command(Ablation, ablate),
    "completion": Command(Completion, complete),
}
#: Commands that rank 0 alone runs, in seconds or minutes, and that begin again if they are repeated.
SHORT = COMMANDS.keys() - {"ablation"}


def described() -> dict[str, str]:
    """Return a line of help per command."""
    return {name: command.line for name, command in COMMANDS.items()}


def unknown(word: str) -> str:
    """Return the error of a word that is no command. The commands that resemble it are named first."""
    near = difflib.get_close_matches(word, COMMANDS, n=len(COMMANDS))
    names = ", ".join(dict.fromkeys([*near, *COMMANDS]))
    return f"expected options of a training run, or a command ({names}), got {word!r}"
