"""`python -m train [COMMAND]`: trains and reports without a command; `--help` lists the commands.

`torchrun --nproc-per-node=N -m train` trains on N GPUs, with the results of one. An installed driver is `gistops-train`
or `python -m gistops.train`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import warnings

from .commands.table import COMMANDS, SHORT, described, unknown
from .commands.training import train
from .config import ConfigError
from .console import open_console, open_missing_streams, say
from .distributed import init_process_group, rank
from .files import WriteError
from .training.divergence import Diverged
from .training.stopping import Stopped, handle_signals

#: Errors of files and disks that a traceback would not explain better.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
SECONDS_FOR_RANK0 = 5.0


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for an invalid option, 1 for a run that failed, 143 for a run that
    SIGTERM stopped, 130 for one that SIGINT stopped, and 141 if nothing reads the output. `predict` returns 3 if it could not read a file."""
    open_missing_streams()
    try:
        try:
            return run([with_home(word) for word in (sys.argv[1:] if args is None else args)])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        return 128 + signal.SIGPIPE


def with_home(word: str) -> str:
    """Replace the ~ in a word such as --data=~/images by the home folder, which shells do only where ~ begins a word."""
    option, equals, value = word.partition("=")
    return f"{option}{equals}{os.path.expanduser(value)}" if option.startswith("--") else word


def run(args: list[str]) -> int:
    """Run the command line, print its error, and return the exit code."""
    with warnings.catch_warnings():
        try:
            with init_process_group(), handle_signals():
                return dispatch(args)
        except SystemExit as error:
            if rank() and error.code:
                time.sleep(SECONDS_FOR_RANK0)  # rank 0 prints the message
            raise
        except (ConfigError, Diverged) as error:
            report_error(str(error))
            return 2 if isinstance(error, ConfigError) else 1
        except OSError as error:
            if not isinstance(error, WriteError) and error.errno not in STORAGE:
                raise
            what = (
                f"cannot write {error}"
                if isinstance(error, WriteError)
                else f"{error.filename or 'the disk'}: {error.strerror}"
            )
            report_error(f"{what}; when this is repaired, {advice_of(args)}")
            return 1
        except Stopped as stopped:
            if not rank():
                print(f"{stopped}; {advice_of(args)}", file=sys.stderr)
            return stopped.exit_code
        except KeyboardInterrupt:
            report_error(f"interrupted; {advice_of(args)}")
            return 130


def advice_of(args: list[str]) -> str:
    """Return how to go on after a command line that has ended early."""
    first = args[0] if args else ""
    how = (
        "continues"
        if first == "ablation"
        else "begins again"
        if first in SHORT
        else "with --resume continues"
    )
    return f"the same command {how}"


def report_error(message: str) -> None:
    """Print an error in one line, once: rank 0 prints errors that all processes find, such as invalid options.

    torchrun ends the other processes as soon as rank 0 has failed. A process that is left alone prints its own error.
    """
    if rank():
        time.sleep(SECONDS_FOR_RANK0)
    print(f"{f'process {rank()}: ' if rank() else ''}error: {message}", file=sys.stderr)


def dispatch(args: list[str]) -> int:
    """Run the command that the first word names. Rank 0 alone writes to the console."""
    console = open_console(quiet=rank() > 0)
    warnings.showwarning = lambda message, *_: say(console, f"warning: {message}")
    # fp16: GradScaler skips a first step that overflows, which is intended.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
    name = args[0] if args else ""
    if name in COMMANDS:
        return 0 if rank() and name in SHORT else COMMANDS[name].run(args[1:], console)
    if name and not name.startswith("-"):
        report_error(unknown(name))
        return 2
    return train(args, console, described())


if __name__ == "__main__":
    sys.exit(main())
