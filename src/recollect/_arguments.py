"""What several packages do with arguments and with what functions return."""

from __future__ import annotations

import operator
from typing import Any, Literal

__all__ = ["Certify", "as_count", "check_certify", "check_count", "pack", "unpack"]

Certify = bool | Literal["exact"]


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


def check_count(name: str, value: int | None) -> None:
    """Raise a ValueError unless ``value`` is ``None`` or an integer of at least 1."""
    if value is not None:
        as_count(name, value, ", or None")


def check_certify(value: Certify) -> Certify:
    """Return what ``certify`` may be.

    Raises:
        ValueError: it is something else.
    """
    if value is not True and value is not False and value != "exact":
        raise ValueError(f'certify must be True, False or "exact" (got {value!r})')
    return value


def pack(value: Any) -> tuple[Any, ...]:
    """Return what a function returned as a tuple of outputs."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def unpack(values: tuple[Any, ...]) -> Any:
    """Return a lone output as it is, and several as a tuple."""
    return values[0] if len(values) == 1 else values
