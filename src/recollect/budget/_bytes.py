"""Numbers of bytes in words."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

__all__ = ["as_bytes", "in_words"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1000**_power}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*|%)\s*")


def as_bytes(budget: Any, device: torch.device) -> int:
    """Return a budget in bytes.

    Args:
        budget: a number of bytes; a number with a unit, such as ``"1.5 GB"`` (10^9 bytes) or ``"1.5 GiB"`` (2^30
            bytes); or a share of the device's memory, such as ``"60%"``, of the machine's on the CPU.
        device: whose share is meant.

    Raises:
        TypeError: it is neither a number nor a string.
        ValueError: it cannot be read, or is not positive.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"budget must be a number of bytes, or words such as '8 GB' or '60%' (got {budget!r})")
    if isinstance(budget, str):
        match = _FORM.fullmatch(budget)
        unit = match[2].upper() if match else None
        if match is None or (unit != "%" and unit not in _UNITS):
            raise ValueError(
                f"budget={budget!r} cannot be read; write bytes (8000000000), a number and a unit (B, KB, MB, GB, TB, "
                "KiB, MiB, GiB, TiB), or a share of the device's memory ('60%')"
            )
        value = float(match[1]) * (memory_of(device) / 100 if unit == "%" else _UNITS[unit or ""])
    else:
        value = float(budget)
    if not 1 <= value < 2**62:
        raise ValueError(f"budget must be at least one byte (got {budget!r})")
    return int(value)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has, in use or not; of the CPU those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(number: float) -> str:
    """Return bytes with a unit of 1000s, in three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(number) >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.3g} {units[0]}"
