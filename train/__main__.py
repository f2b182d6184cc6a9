"""`python -m train`: checks what it was asked for, trains, and says what came of it.

`python -m train ablation` does so for many seeds; `python -m train doctor` only looks at the data; `python -m train features`
runs a trained network over it; `python -m train report` puts runs beside one another in a page. `torchrun
--nproc-per-node=N -m train` trains on N GPUs, the same as on one.
"""

from __future__ import annotations

import sys
import warnings

from rich.console import Console

from .cli import parse, parse_run, program
from .commands.ablation import Ablation, ablate
from .commands.compare import compare
from .commands.doctor import Doctor, examine
from .commands.features import Features, extract
from .config import ConfigError
from .console import say
from .distributed import init_process_group, rank
from .run import start
from .training.stopping import EXIT_CODE, Stopped, handle_sigterm
from .training.trainer import Diverged


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for an option that cannot be, 1 for a run that failed, 75
    for one that SIGTERM stopped."""
    args = sys.argv[1:] if args is None else args
    with warnings.catch_warnings():
        try:
            with init_process_group(), handle_sigterm():
                return dispatch(args)
        except (ConfigError, Diverged) as error:
            print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
        except Stopped as stopped:
            print(f"{stopped}; the same command with --resume goes on from there", file=sys.stderr)
            return EXIT_CODE
        except KeyboardInterrupt:
            print(
                "interrupted; the same command with --resume goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 130


def dispatch(args: list[str]) -> int:
    """Do what the first word says; the first process alone speaks."""
    console = Console(quiet=rank() > 0)
    warnings.showwarning = lambda message, *_: say(console, f"warning: {message}")
    # fp16: a first step that overflows is left out, as it should be.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    if args[:1] == ["ablation"]:
        return ablate(parse(args[1:], Ablation, program("ablation")), console)
    if rank() and args[:1] in (["report"], ["doctor"], ["features"]):
        return 0  # done once
    if args[:1] == ["report"]:
        return compare(args[1:], console)
    if args[:1] == ["doctor"]:
        return examine(parse(args[1:], Doctor, program("doctor")), console)
    if args[:1] == ["features"]:
        return extract(parse(args[1:], Features, program("features")), console)
    start(parse_run(args), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
