"""`python -m train`: checks what it was asked for, trains, and says what came of it.

`python -m train ablation` does so for many seeds; `python -m train doctor` only looks at the data; `python -m train features`
runs a trained network over it; `python -m train report` puts runs beside one another in a page.
"""

from __future__ import annotations

import sys
import warnings

from rich.console import Console

from .ablation import Ablation, ablate
from .commandline import from_command_line
from .config import ConfigError
from .display import say
from .doctor import examine
from .engine import Diverged
from .features import Features, extract
from .page import compare
from .run import start


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for an option that cannot be, 1 for a run that failed."""
    args = sys.argv[1:] if args is None else args
    console = Console()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(console, f"warning: {message}")
        try:
            if args[:1] == ["ablation"]:
                return ablate(from_command_line(args[1:], Ablation), console)
            if args[:1] == ["report"]:
                return compare(args[1:], console)
            if args[:1] == ["doctor"]:
                return examine(from_command_line(args[1:]), console)
            if args[:1] == ["features"]:
                return extract(from_command_line(args[1:], Features), console)
            start(from_command_line(args), console)
            return 0
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(
                "interrupted; the same command with --resume goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 130


if __name__ == "__main__":
    sys.exit(main())
