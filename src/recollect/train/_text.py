"""Numbers in words, and the table that terminal and report share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

__all__ = [
    "METRICS",
    "STRATEGIES",
    "budget_rows",
    "budget_text",
    "bytes_text",
    "compared_text",
    "histories_text",
    "layers_text",
    "per_layer",
    "percent_text",
    "range_text",
    "seconds_text",
    "table",
    "tables_text",
]

METRICS = {
    **{"accuracy": "accuracy", "rocauc": "ROC-AUC"},
    **{"micro_f1": "micro-F1", "average_precision": "average precision"},
}
# What is done with a unit, by its strategy; a link is a checkpoint whose input the unit before makes again.
STRATEGIES = {
    "store": "stored",
    "checkpoint": "checkpointed",
    "link": "checkpointed",
    "selective": "stored in part",
    "offload": "offloaded",
    "invert": "inverted",
}


def bytes_text(number: int | None) -> str:
    """Bytes as KiB, MiB or GiB."""
    if number is None:
        return "not measured"
    if number < 2**20:
        return f"{number / 2**10:,.1f} KiB"
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def seconds_text(number: float | None) -> str:
    """Seconds, with three digits."""
    return "not measured" if number is None else f"{number:.3g} s" if number < 100 else f"{number:,.0f} s"


def percent_text(summary: Mapping[str, Any], key: str) -> str:
    """A score in percent; of several runs their mean and standard deviation."""
    deviation = summary.get(f"{key}_std")
    return f"{100 * summary[key]:.2f} %" if deviation is None else f"{100 * summary[key]:.2f} ± {100 * deviation:.2f} %"


def per_layer(row: Mapping[str, float], name: str) -> list[float]:
    """The values ``name_1``, ``name_2``, ... of an epoch."""
    return [value for key, value in row.items() if key.rpartition("_")[0] == name and key[len(name) + 1 :].isdigit()]


def range_text(values: Sequence[float], digits: str = ".2f") -> str:
    """A value for each layer, or the least and the greatest of many; "" if there are none."""
    known = [value for value in values if not math.isnan(value)]
    texts = [format(value, digits) for value in known]
    if len(set(texts)) <= 1:
        return "".join(texts[:1])
    if len(texts) <= 4:
        return "/".join(texts)
    return f"{format(min(known), digits)} to {format(max(known), digits)}"


def histories_text(histories: Mapping[str, Any]) -> str:
    """Number, rows, type, bytes and place."""
    size = f"{histories['layers']} x {histories['rows']:,} rows, {histories['dtype']}: {bytes_text(histories['bytes'])}"
    return f"{size} ({histories['place']})"


def tables_text(tables: Mapping[str, Any]) -> str:
    """What they hold for each node, bytes and place."""
    return f"{tables['rows']:,} x {tables['numbers']:,} numbers: {bytes_text(tables['bytes'])} ({tables['place']})"


def layers_text(summary: Mapping[str, Any]) -> str:
    """The number of layers and a comma, if it is known."""
    layers = summary["layers"]
    return "" if layers is None else f"{layers} layer{'' if layers == 1 else 's'}, "


def compared_text(first: float | None, second: float | None, less: str, more: str) -> str:
    """How the first number compares with the second, as a factor above 1: ``"3.1x less"`` or ``"1.25x more"``."""
    if not first or not second:
        return ""
    factor, word = (second / first, less) if second >= first else (first / second, more)
    return "the same" if factor < 1.005 else f"{factor:.3g}x {word}"


def table(summary: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str, str, str]]]:
    """What to show of a summary.

    Returns:
        Facts (name, value), and costs (name, in the first and in the second of ``modes``, how they compare).
    """
    metric = METRICS[summary["metric"]]
    runs = summary.get("results", [])
    best = f"{len(runs)} runs" if runs else f"epoch {summary['best_epoch']}"
    facts = [
        (f"test {metric}", percent_text(summary, "test_accuracy")),
        (f"validation {metric}", f"{percent_text(summary, 'val_accuracy')} ({best})"),
        *(
            (f"test {METRICS[name]}", f"{100 * score:.2f} %")
            for name, score in summary.get("other_scores", {}).items()
            if not runs
        ),
        ("epochs", f"{summary['epochs']} in {seconds_text(summary['seconds'])}"),
        ("graph", f"{summary['dataset']}: {summary['nodes']:,} nodes, {summary['edges']:,} edges"),
        ("model", f"{summary['model']}: {layers_text(summary)}{summary['parameters']:,} parameters"),
        ("parameters, gradients, optimizer", bytes_text(summary["state_bytes"])),
        *_budget(summary),
        *_seen(summary),
        *_objectives(summary),
        ("device", f"{summary['device']} ({summary['device_name']}), {summary['precision']}"),
    ]
    return facts, _costs(summary)


def budget_text(budget: Mapping[str, Any]) -> str:
    """What a memory budget's plan does, in a line."""
    units = budget["units"]
    found = Counter(STRATEGIES[unit["strategy"]] for unit in units)
    done = ", ".join(f"{number} {name}" for name, number in found.items())
    return (
        f"memory budget: {bytes_text(budget['bytes'])}; peak of a step {bytes_text(budget['peak_bytes'])}, measured "
        f"with gradients; of {len(units)} units {done}; adds about {seconds_text(budget['added_seconds'])} to a step"
    )


def budget_rows(budget: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table of units; those in a row that are treated alike have one.

    Each has the units, what one keeps if everything is kept, what is done, what one keeps then, and the seconds that
    all add.
    """
    rows = []
    for alike, group in groupby(budget["units"], key=lambda u: (u["strategy"], u["keeps"], u["bytes"])):
        units, (strategy, keeps, kept) = list(group), alike
        first, last = units[0]["unit"], units[-1]["unit"]
        names = first if len(units) == 1 else f"{first} to {last} ({len(units)})"
        seconds = sum(unit["seconds"] for unit in units)
        again = " with the one before" if strategy == "link" else ""
        rows.append([names, bytes_text(keeps), STRATEGIES[strategy] + again, bytes_text(kept), seconds_text(seconds)])
    return rows


def _budget(summary: dict[str, Any]) -> list[tuple[str, str]]:
    budget = summary.get("memory_budget")  # not in summaries of versions before
    if budget is None:
        return []
    name, _, said = budget_text(budget).partition(": ")
    return [(name, said)]


def _seen(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What reconstruction left to be seen; what histories or tables take."""
    found: list[tuple[str, str]] = []
    first, histories, tables = summary["modes"][0], summary["histories"], summary.get("tables")
    drift = summary["largest_drift"]
    if first == "reversible" or drift is not None:
        found.append(("largest drift", "nothing was reconstructed" if drift is None else f"{drift:.1e}"))
    if tables is not None:
        found.append(("tables", tables_text(tables)))
    if histories is None:
        return found
    ages = f"{range_text(histories['ages'])} steps" if histories["ages"] else "there are none"
    found += [("histories", histories_text(histories)), ("their mean age", ages)]
    return [*found, ("their relative error", range_text(histories["errors"], ".1e"))] if histories["errors"] else found


def _objectives(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """How much objectives opposed each other, and whether a step went against one of them."""
    if summary["conflict"] is None:
        return []
    return [
        ("objectives", summary["objective"]),
        ("pairs in conflict", f"{100 * summary['conflict']:.1f} %, mean of all epochs"),
        ("least cosine of an update with a gradient", f"{summary['smallest_cosine']:.3f}"),
    ]


def _costs(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    peak, plain, expected = summary["peak_bytes"], summary["peak_bytes_plain"], summary["expected_bytes_plain"]
    seconds, seconds_plain = summary["seconds_per_epoch"], summary["seconds_per_epoch_plain"]
    kept = f"does not fit (about {bytes_text(expected)})" if plain is None and expected else bytes_text(plain)
    return [
        (
            "peak memory of a step",
            bytes_text(peak),
            kept,
            compared_text(peak, plain, "less", "more"),
        ),
        (
            "seconds per epoch",
            seconds_text(seconds),
            seconds_text(seconds_plain),
            compared_text(seconds, seconds_plain, "faster", "slower"),
        ),
    ]
