"""What benchmarks of depth print. A dash is a number that was not measured, for the reason in the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench._exactness import Errors
from bench._measure import Row
from bench._report import MIB, show, table


def progress(row: Row, names: Iterable[str]) -> str:
    """One row as soon as it is measured, with what was skipped."""
    cells = [f"{name} {show(row['peak_bytes'].get(name), '.1f', MIB)}" for name in names]
    lines = [f"  L={row['depth']}: {', '.join(cells)} MiB"]
    lines += [f"    no {name}: {reason}" for name, reason in row["skipped"].items()]
    return "\n".join(lines)


def depth_tables(rows: Sequence[Row], systems: Iterable[str]) -> str:
    """Peaks and drift by depth, and times where there are any."""
    names = list(systems)
    parts = [
        _by_depth(names, "peak tensor bytes of a step, MiB", rows, "peak_bytes", ".1f", MIB),
        _by_depth(names, "peak bytes of the CPU allocator in a step, MiB", rows, "allocator_bytes", ".1f", MIB),
        _by_depth(names, "seconds of a step, median", rows, "seconds", ".3f"),
        _by_depth(names, "gradient's relative error against plain autograd", rows, "gradient_error", ".1e"),
        _by_depth(names, "relative error of the reconstructed input, as the system itself says", rows, "drift", ".1e"),
        _restored(names, rows),
    ]
    return "\n\n".join(part for part in parts if part)


def gradient_table(errors: Errors, layers: str, systems: Iterable[str]) -> str:
    names = list(systems)
    body = [[case, *(show(by_system.get(name), ".1e") for name in names)] for case, by_system in errors.items()]
    return f"gradient's relative error against plain autograd, {layers}\n{table(['', *names], body)}"


def _by_depth(names: Sequence[str], title: str, rows: Sequence[Row], key: str, form: str, scale: float = 1.0) -> str:
    found = [row for row in rows if any(value is not None for value in row.get(key, {}).values())]
    body = [[str(row["depth"]), *(show(row[key].get(name), form, scale) for name in names)] for row in found]
    return f"{title}\n{table(['layers', *names], body)}" if body else ""


def _restored(names: Sequence[str], rows: Sequence[Row]) -> str:
    plain = [
        {**row, "restored": {name: entry["error"] for name, entry in row["restored_input"].items()}}
        for row in rows
        if "restored_input" in row
    ]
    text = _by_depth(
        names, "relative error of the reconstructed input, compared with the original", plain, "restored", ".1e"
    )
    hows = {name: entry["how"] for row in plain for name, entry in row["restored_input"].items()}
    return "\n".join([text, *(f"  {name}: {how}" for name, how in hows.items())]) if text else ""
