"""What numbers must be before anything is made of them, here and in the networks of other parts."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["as_count"]


def as_count(name: str, value: Any, hint: str = "") -> int:
    """Return an integer of any type, such as numpy's, as an ``int``.

    Args:
        name: of the argument, for the message.
        value: what was given for it.
        hint: for the message: where such a number comes from.

    Raises:
        ValueError: it is no integer, or below 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer of at least 1{hint} (got {value!r})") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1{hint} (got {number})")
    return number
