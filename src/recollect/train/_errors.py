"""What can go wrong in a run, by what the user can do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InvalidRunError", "MissingRunError", "NonFiniteLossError", "TrainingError", "UsageError", "choose_from"]


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to do. Ends the command with ``exit_code``."""

    exit_code = 1


class UsageError(TrainingError, ValueError):
    """A name, key or value is wrong: choose one of those in the message."""

    exit_code = 2


class InvalidRunError(TrainingError):
    """The folder holds no run, or one whose files cannot be read: give another folder."""


class MissingRunError(UsageError, InvalidRunError):
    """There is no run in the folder that was named."""


class NonFiniteLossError(TrainingError, ArithmeticError):
    """The loss became NaN or infinite: change the settings that the message names.

    Attributes:
        epoch: the epoch, from 1, whose loss it was.
    """

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


def choose_from(what: str, wrong: object, right: Iterable[str]) -> str:
    """Say that a name is wrong, which is nearest to it, and list the right ones."""
    names = list(right)
    near = difflib.get_close_matches(str(wrong), names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"there is no {what} {str(wrong)!r}{guess}; choose from: {', '.join(names) or 'nothing, it has none'}"
