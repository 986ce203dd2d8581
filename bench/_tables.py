"""What the depth benchmark prints. A dash is a number that was not measured, for the reason in the JSON."""

from __future__ import annotations

from collections.abc import Sequence

from bench._exactness import Errors
from bench._measure import Row
from bench._report import MIB, show, table
from bench._systems import SYSTEMS


def progress(row: Row) -> str:
    """One row as soon as it is measured, with what was skipped."""
    cells = [f"{name} {show(row['peak_bytes'].get(name), '.1f', MIB)}" for name in SYSTEMS]
    lines = [f"  L={row['depth']}: {', '.join(cells)} MiB"]
    lines += [f"    no {name}: {reason}" for name, reason in row["skipped"].items()]
    return "\n".join(lines)


def depth_tables(rows: Sequence[Row]) -> str:
    """Peaks and drift by depth, and times where there are any."""
    parts = [
        _by_depth("peak tensor bytes of a step, MiB", rows, "peak_bytes", ".1f", MIB),
        _by_depth("peak bytes of the CPU allocator in a step, MiB", rows, "allocator_bytes", ".1f", MIB),
        _by_depth("seconds of a step, median", rows, "seconds", ".3f"),
        _by_depth("gradient's relative error against plain autograd", rows, "gradient_error", ".1e"),
        _by_depth("relative error of the reconstructed input, as the system itself says", rows, "drift", ".1e"),
        _restored(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def gradient_table(errors: Errors, layers: int) -> str:
    body = [[case, *(show(by_system.get(name), ".1e") for name in SYSTEMS)] for case, by_system in errors.items()]
    title = f"gradient's relative error against plain autograd, {layers} layers of (norm, ReLU, dropout, SAGE)"
    return f"{title}\n{table(['', *SYSTEMS], body)}"


def _by_depth(title: str, rows: Sequence[Row], key: str, form: str, scale: float = 1.0) -> str:
    found = [row for row in rows if any(value is not None for value in row.get(key, {}).values())]
    body = [[str(row["depth"]), *(show(row[key].get(name), form, scale) for name in SYSTEMS)] for row in found]
    return f"{title}\n{table(['layers', *SYSTEMS], body)}" if body else ""


def _restored(rows: Sequence[Row]) -> str:
    plain = [
        {**row, "restored": {name: entry["error"] for name, entry in row["restored_input"].items()}}
        for row in rows
        if "restored_input" in row
    ]
    text = _by_depth("relative error of the reconstructed input, compared with the original", plain, "restored", ".1e")
    hows = {name: entry["how"] for row in plain for name, entry in row["restored_input"].items()}
    return "\n".join([text, *(f"  {name}: {how}" for name, how in hows.items())]) if text else ""
