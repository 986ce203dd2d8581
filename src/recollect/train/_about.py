"""What is known of a setting beside its type."""

from __future__ import annotations

from typing import Any

__all__ = ["about"]


def about(
    text: str, *, low: float | None = None, below: float | None = None, choices: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """A setting's meaning, its least value, its (excluded) upper bound, and the values it can have."""
    return {"help": text, "low": low, "below": below, "choices": choices}
