"""What was compared between forwards and rebuilds: figures beside the drift."""

from __future__ import annotations

from typing import Literal

__all__ = ["Certificate", "Certify"]

Certify = bool | Literal["exact"]


class Certificate:
    """Figures of what was certified; nothing is counted yet."""

    __slots__ = ()

    def reset(self) -> None:
        """Begin to count anew."""
