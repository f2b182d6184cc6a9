"""`python -m train [COMMAND]`: train and report (no command), ablation, doctor, features or report.

`torchrun --nproc-per-node=N -m train` trains on N GPUs, with the results of one. An installed driver is `gistops-train`
or `python -m gistops.train`.
"""

from __future__ import annotations

import sys
import warnings

from .cli import parse, parse_run, program
from .commands.ablation import Ablation, ablate
from .commands.doctor import Doctor, examine
from .commands.features import Features, extract
from .commands.report import compare
from .config import ConfigError
from .console import open_console, say
from .distributed import init_process_group, rank
from .run import start
from .training.stopping import EXIT_CODE, Stopped, handle_sigterm
from .training.trainer import Diverged


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for an invalid option, 1 for a run that failed, 75 for a run that
    SIGTERM stopped, 130 for an interrupted run."""
    args = sys.argv[1:] if args is None else args
    with warnings.catch_warnings():
        try:
            with init_process_group(), handle_sigterm():
                return dispatch(args)
        except (ConfigError, Diverged) as error:
            print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
        except Stopped as stopped:
            print(f"{stopped}; the same command with --resume continues", file=sys.stderr)
            return EXIT_CODE
        except KeyboardInterrupt:
            print(
                "interrupted; the same command with --resume continues from the last checkpoint",
                file=sys.stderr,
            )
            return 130


def dispatch(args: list[str]) -> int:
    """Run the command that the first word names. Rank 0 alone writes to the console."""
    console = open_console(quiet=rank() > 0)
    warnings.showwarning = lambda message, *_: say(console, f"warning: {message}")
    # fp16: GradScaler skips a first step that overflows, which is intended.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    if args[:1] == ["ablation"]:
        return ablate(parse(args[1:], Ablation, program("ablation")), console)
    if rank() and args[:1] in (["report"], ["doctor"], ["features"]):
        return 0  # rank 0 alone runs these commands
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
