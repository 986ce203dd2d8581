"""How much of what a file tells can be true on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable


def physical_memory() -> float:
    """Bytes of the machine's memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def fits_in_memory(sizes: Iterable[float], item_bytes: int = 8) -> bool:
    """Whether an array of this shape is smaller than the machine's memory."""
    return math.prod(sizes) * item_bytes <= physical_memory()
