"""What is known of a setting beside its type."""

from __future__ import annotations

from typing import Any

__all__ = ["about"]


def about(
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    needs: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """What is known of a setting.

    Args:
        text: its meaning.
        low: its least value.
        above: its lower bound, excluded.
        below: its upper bound, excluded.
        choices: the values that it can have.
        needs: a group, and those of the group's options with which it counts; None: it always does.
    """
    return {"help": text, "low": low, "above": above, "below": below, "choices": choices, "needs": needs}
