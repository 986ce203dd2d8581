"""What the benchmark of objectives prints. A dash is a number that was not measured, for the reason in the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench._objectives_measure import Row
from bench._objectives_targets import name_of, ratios
from bench._report import MIB, ratio, show, table


def progress(row: Row, names: Iterable[str]) -> str:
    """One work as soon as it is measured, with what was skipped."""
    cells = [f"{name} {show(row['seconds'].get(name), '.3f')} s" for name in names]
    lines = [f"  {name_of(row)}: {', '.join(cells)}"]
    lines += [f"    no {name}: {reason}" for name, reason in row["skipped"].items()]
    return "\n".join(lines)


def work_tables(rows: Sequence[Row], systems: Iterable[str]) -> str:
    """Times, peaks, ratios and differences, a line for each work."""
    names = list(systems)
    others = [name for name in names if name != "recollect"]
    parts = [
        _by_work(names, "seconds of forward and Gramian (plain: and backward), median", rows, "seconds", ".4f"),
        _by_work(names, "seconds of compute_gramian alone (plain: backward), median", rows, "gramian_seconds", ".4f"),
        _by_work(names, "peak tensor bytes of forward and Gramian, MiB", rows, "peak_bytes", ".1f", MIB),
        _ratios(others, "recollect / other: forward and Gramian", rows, "seconds"),
        _ratios(others, "recollect / other: compute_gramian", rows, "gramian_seconds"),
        _ratios(others, "recollect / other: peak", rows, "peak_bytes"),
        _by_work(others[1:], "relative difference of the Gramian from recollect's", rows, "difference", ".1e"),
    ]
    return "\n\n".join(parts)


def weight_table(rows: Sequence[Row]) -> str:
    """UPGrad's weights, a line for each number of losses and kind of Gramian."""
    head = ["", "recollect, ms", "torchjd, ms", "recollect / torchjd", "objective, relative to torchjd's", "residual"]
    body = []
    for row in rows:
        for kind, found in row["kinds"].items():
            ours, theirs = found["seconds"].get("recollect"), found["seconds"].get("torchjd")
            times = [show(ours, ".3f", 1e-3), show(theirs, ".3f", 1e-3), show(ratio(ours, theirs), ".4f")]
            exact = [show(found["objective_difference"], ".1e"), show(found["residual"], ".1e")]
            body.append([f"m = {row['objectives']}, {kind}", *times, *exact])
    return f"UPGrad's weights from a Gramian\n{table(head, body)}"


def _by_work(names: Sequence[str], title: str, rows: Sequence[Row], key: str, form: str, scale: float = 1.0) -> str:
    body = [[name_of(row), *(show(row[key].get(name), form, scale) for name in names)] for row in rows]
    return f"{title}\n{table(['', *names], body)}"


def _ratios(names: Sequence[str], title: str, rows: Sequence[Row], key: str) -> str:
    return _by_work(names, title, [{**row, "ratio": ratios(row, key)} for row in rows], "ratio", ".3f")
