"""Files of text of a run that may have been changed since: what is read of them is checked before it is used.

Without torch: settings are read before it is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from recollect.train._errors import InvalidRunError
from recollect.train._text import table

__all__ = ["check_settings_text", "check_summary", "read_text"]

_LARGEST = 2**24  # bytes of a file of text that belongs to a run
_DEEPEST = 12  # levels of settings
# What several runs' summaries are combined by, and what their report shows beside the table.
_SUMMARY = ("seed", "split", "test_accuracy", "val_accuracy", "best_epoch", "epochs", "seconds", "torch", "recollect")


def read_text(path: Path) -> str:
    """Read a file of a run.

    Raises:
        InvalidRunError: it is no file of text, or too large for one of these.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise InvalidRunError(f"{path} is no file")
        if path.stat().st_size > _LARGEST:
            raise InvalidRunError(f"{path} has more than {_LARGEST / 2**20:.0f} MiB, so it is not a file of a run")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRunError(f"{path} cannot be read: {error}") from error


def check_settings_text(text: str, path: Path) -> str:
    """Refuse YAML whose few lines stand for more: aliases, which can stand for each other without end, and tags.

    Args:
        text: of the file.
        path: for messages.

    Raises:
        InvalidRunError: it has one, or is no YAML.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InvalidRunError(
                    f"{path}, line {event.start_mark.line + 1}: has an anchor or alias (& or *), which no "
                    f"settings of a run have; write the values out"
                )
            if getattr(event, "tag", None):
                raise InvalidRunError(
                    f"{path}, line {event.start_mark.line + 1}: has a tag (!), which no settings have"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise InvalidRunError(f"{path}, line {event.start_mark.line + 1}: has more than {_DEEPEST} levels")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).strip().partition("\n")[0]
        raise InvalidRunError(f"{path} cannot be read as the settings of a run: {line}") from error
    return text


def check_summary(text: str, path: Path) -> dict[str, Any]:
    """Read a summary in which all is there that is shown.

    Args:
        text: of the file.
        path: for messages.

    Raises:
        InvalidRunError: it is damaged; the message says where.
    """
    try:
        summary = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRunError(f"{path} cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise InvalidRunError(f"{path} is not the summary of a run")
    try:
        for key in _SUMMARY:
            summary[key]
        table(summary)  # reads all that is shown
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InvalidRunError(
            f"{path} is not the whole summary of a run ({type(error).__name__}: {error}); remove it, and resume the run"
        ) from error
    return summary
