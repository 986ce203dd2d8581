"""`recollect train`, as the command line calls it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recollect.train._errors import BusyRunError, Interrupted, TrainingError, UsageError

__all__ = ["command"]


def command(arguments: Sequence[str]) -> int:
    """Run and return the exit code: 0, 1 for a run that failed, 2 for wrong usage, 130 for one that was interrupted.

    What is wrong with the words is said before anything is imported that takes long, such as torch.

    Args:
        arguments: the words after ``recollect train``.

    Returns:
        The exit code; messages of errors go to the standard error.

    Example:
        >>> import contextlib, io
        >>> from recollect.train import command
        >>> with contextlib.redirect_stderr(io.StringIO()) as said:
        ...     code = command(["--quickly"])
        >>> code, said.getvalue().splitlines()[0]
        (2, "recollect train: unknown option '--quickly': settings are written key=value; -m sweeps over key=a,b")
    """
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            from recollect.train._help import help_text

            sys.stdout.write(help_text())
            return 0
        _run(list(arguments))
    except TrainingError as error:
        sys.stderr.write(f"recollect train: {error}\n")
        if isinstance(error, UsageError) and not isinstance(error, BusyRunError):
            sys.stderr.write("All groups, options and keys: recollect train --help\n")
        return error.exit_code
    except Interrupted as interrupt:
        sys.stderr.write(f"\ninterrupted; go on with: {interrupt.again}\n")
        return 130
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before the run had a folder: nothing was written\n")
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    from rich.console import Console

    sweeping = [argument for argument in arguments if argument in ("-m", "--multirun")]
    words = [argument for argument in arguments if argument not in sweeping]
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise UsageError(f"unknown option {flags[0]!r}: settings are written key=value; -m sweeps over key=a,b")
    if sweeping:
        from recollect.train._sweep import sweep

        sweep(words, Console())
        return
    from recollect.train._run import train

    train(words, Console())
