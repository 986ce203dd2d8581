"""What can go wrong in a run, by what the user can do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

__all__ = [
    "BusyRunError",
    "Interrupted",
    "InvalidRunError",
    "MissingRunError",
    "NonFiniteLossError",
    "TrainingError",
    "UsageError",
    "choose_from",
    "did_you_mean",
    "nearest_keys",
]

_GLANCE, _FEW = 6, 12  # so many names are read at a glance, and so many are read
_NEAR = 0.6  # of two texts, one may be the other with some typos


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to do. Ends the command with ``exit_code``.

    Example:
        >>> from recollect.train import TrainingError, UsageError
        >>> issubclass(UsageError, TrainingError), TrainingError.exit_code, UsageError.exit_code
        (True, 1, 2)
    """

    exit_code = 1


class UsageError(TrainingError, ValueError):
    """A name, key or value is wrong: choose one of those in the message.

    Example:
        >>> from recollect.train import UsageError, train
        >>> try:
        ...     train(["dataset=karatee"])
        ... except UsageError as error:
        ...     print("did you mean karate" in str(error))
        True
    """

    exit_code = 2


class InvalidRunError(TrainingError):
    """The folder holds no run, or one whose files cannot be read: give another folder.

    Example:
        >>> import tempfile
        >>> from recollect.train import InvalidRunError, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         train([f"resume={folder}"])
        ...     except InvalidRunError as error:
        ...         print(folder in str(error))
        True
    """


class MissingRunError(UsageError, InvalidRunError):
    """There is no run in the folder that was named."""


class BusyRunError(UsageError):
    """Another process works on the run."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, in a run that can be gone on with.

    Attributes:
        again: the command that goes on.
    """

    def __init__(self, again: str) -> None:
        super().__init__(again)
        self.again = again


class NonFiniteLossError(TrainingError, ArithmeticError):
    """The loss became NaN or infinite: change the settings that the message names.

    Attributes:
        epoch: the epoch, from 1, whose loss it was.

    Example:
        >>> import tempfile, torch
        >>> from recollect.data import load
        >>> from recollect.train import NonFiniteLossError, fit
        >>> class Broken(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(34, 4)
        ...     def forward(self, x, edge_index):
        ...         return self.linear(x) / 0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         fit(Broken(), load("karate"), epochs=2, out=folder)
        ...     except NonFiniteLossError as error:
        ...         print(error.epoch)
        1
    """

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


def did_you_mean(wrong: object, right: Iterable[str]) -> str:
    """Ask for the nearest names; where none is near, list all if they are few, else the first of them."""
    names = list(right)
    near = difflib.get_close_matches(str(wrong), names, n=3)
    if near:
        all_of_them = f" Choose from: {', '.join(names)}" if len(names) <= _GLANCE else ""
        return f"did you mean {' or '.join(near)}?{all_of_them}"
    if not names:
        return "there are none"
    if len(names) <= _FEW:
        return f"choose from: {', '.join(names)}"
    return f"choose from: {', '.join(names[:_FEW])}, and {len(names) - _FEW} more"


def choose_from(what: str, wrong: object, right: Iterable[str]) -> str:
    """Say that a name is wrong, and which is nearest to it."""
    return f"there is no {what} {str(wrong)!r}; {did_you_mean(wrong, right)}"


def nearest_keys(wrong: str, meanings: Mapping[str, str]) -> str:
    """Say which keys are nearest to one that is not there, by their names and by what they mean."""
    said = wrong.rpartition(".")[2].replace("_", " ")

    def likeness(key: str) -> float:
        name = key.rpartition(".")[2].replace("_", " ")
        pairs = (wrong, key), (said, name), (said, re.split(r"[,:;(]", meanings[key])[0])
        return max(difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs)

    near = sorted(meanings, key=likeness, reverse=True)
    best = [key for key in near[:3] if likeness(key) >= max(_NEAR, 0.9 * likeness(near[0]))]
    return f"did you mean {' or '.join(best)}?" if best else "all keys: recollect train --help"
