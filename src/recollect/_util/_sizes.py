"""Numbers of bytes as they are written; without torch, so that what cannot be read is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Size", "as_size"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1000**_power}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*|%)\s*")


@dataclass(frozen=True)
class Size:
    """Bytes, or a share of the memory that there is.

    Args:
        number: of bytes; of a share, 1 is all of the memory.
        share: which of both it is.
    """

    number: float
    share: bool = False


def as_size(budget: Any, name: str = "budget") -> Size:
    """Return what a number, or a number and a unit, says.

    Args:
        budget: a number of bytes; a number with a unit, such as ``"1.5 GB"`` (10^9 bytes) or ``"1.5 GiB"`` (2^30
            bytes); or a share, such as ``"60%"``.
        name: of the value, for messages.

    Raises:
        TypeError: it is neither a number nor a string.
        ValueError: it cannot be read, or is out of range.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"{name} must be a number of bytes, or words such as '8 GB' or '60%' (got {budget!r})")
    unit = ""
    if isinstance(budget, str):
        match = _FORM.fullmatch(budget)
        unit = match[2].upper() if match else "?"
        if match is None or (unit != "%" and unit not in _UNITS):
            raise ValueError(
                f"{name}={budget!r} cannot be read; write bytes (8000000000), a number and a unit (B, KB, MB, GB, TB, "
                "KiB, MiB, GiB, TiB), or a share of the device's memory ('60%')"
            )
        number = float(match[1])
    else:
        number = float(budget)
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError(f"{name}={budget!r}: a share is above 0% and at most 100%")
        return Size(number / 100, share=True)
    number *= _UNITS[unit]
    if not 1 <= number < 2**62:
        raise ValueError(f"{name} must be at least one byte and below 4 EiB (got {budget!r})")
    return Size(number)
