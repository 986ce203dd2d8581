"""Numbers of bytes in words."""

from __future__ import annotations

import os
from typing import Any

import torch

from recollect._util._sizes import as_size

__all__ = ["as_bytes", "in_words"]


def as_bytes(budget: Any, device: torch.device) -> int:
    """Return a budget in bytes.

    Args:
        budget: a number of bytes; a number with a unit, such as ``"1.5 GB"`` (10^9 bytes) or ``"1.5 GiB"`` (2^30
            bytes); or a share of the device's memory, such as ``"60%"``, of the machine's on the CPU.
        device: whose share is meant.

    Raises:
        TypeError: it is neither a number nor a string.
        ValueError: it cannot be read, is out of range, or is a share of memory of which torch knows no size.
    """
    size = as_size(budget)
    return int(size.number * memory_of(device)) if size.share else int(size.number)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has, in use or not; of the CPU those of the machine.

    Raises:
        ValueError: torch does not know.
    """
    if device.type not in ("cpu", "mps"):  # mps has the machine's memory too
        module = torch.get_device_module(device)
        if not hasattr(module, "get_device_properties"):
            raise ValueError(f"torch does not say how much memory {device} has: give the budget in bytes")
        return int(module.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(number: float) -> str:
    """Return bytes with a unit of 1000s, in three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(number) >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.3g} {units[0]}"
