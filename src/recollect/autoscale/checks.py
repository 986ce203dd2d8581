"""What numbers must be before anything is made of them, here and in the networks of other parts."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["as_count"]


def as_count(name: str, value: Any, hint: str = "", *, least: int = 1) -> int:
    """Return an integer of any type, such as numpy's, as an ``int``.

    Args:
        name: of the argument, for the message.
        value: what was given for it.
        hint: for the message: where such a number comes from.
        least: that is allowed.

    Raises:
        ValueError: it is no integer, or too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer of at least {least}{hint} (got {value!r})") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}{hint} (got {number})")
    return number
