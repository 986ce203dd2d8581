"""Checks of arguments that several packages make."""

from __future__ import annotations

__all__ = ["check_count"]


def check_count(name: str, value: int | None) -> None:
    """Raise a ValueError unless ``value`` is ``None`` or at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be None or at least 1 (got {value})")
