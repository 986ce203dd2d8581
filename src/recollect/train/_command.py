"""`recollect train`, as the command line calls it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from recollect.train._errors import TrainingError, UsageError
from recollect.train._help import help_text
from recollect.train._run import train

__all__ = ["command"]


def command(arguments: Sequence[str]) -> int:
    """Run and return the exit code: 0, 1 for a run that failed, 2 for wrong usage, 130 for one that was interrupted."""
    if any(argument in ("-h", "--help") for argument in arguments):
        sys.stdout.write(help_text())
        return 0
    try:
        flags = [argument for argument in arguments if argument.startswith("-")]
        if flags:
            raise UsageError(f"unknown option {flags[0]!r}: settings are written key=value")
        train(arguments, Console())
    except TrainingError as error:
        sys.stderr.write(f"recollect train: {error}\n")
        if isinstance(error, UsageError):
            sys.stderr.write("All groups, options and keys: recollect train --help\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; go on with: recollect train resume=RUN_DIR (the folder that is named above)\n")
        return 130
    return 0
