"""What several packages do with arguments and with what functions return."""

from __future__ import annotations

from typing import Any

__all__ = ["check_count", "pack", "unpack"]


def check_count(name: str, value: int | None) -> None:
    """Raise a ValueError unless ``value`` is ``None`` or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be None or at least 1 (got {value})")


def pack(value: Any) -> tuple[Any, ...]:
    """Return what a function returned as a tuple of outputs."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def unpack(values: tuple[Any, ...]) -> Any:
    """Return a lone output as it is, and several as a tuple."""
    return values[0] if len(values) == 1 else values
