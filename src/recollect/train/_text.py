"""Numbers in words, and the table that terminal and report share."""

from __future__ import annotations

from typing import Any

__all__ = ["METRICS", "bytes_text", "seconds_text", "table"]

METRICS = {"accuracy": "accuracy", "rocauc": "ROC-AUC", "micro_f1": "micro-F1"}


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


def table(summary: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str, str, str]]]:
    """What to show of a summary.

    Returns:
        Facts (name, value), and costs (name, reversible, everything kept, how they compare).
    """
    metric = METRICS[summary["metric"]]
    drift = summary["largest_drift"]
    facts = [
        (f"test {metric}", f"{100 * summary['test_accuracy']:.2f} %"),
        (f"validation {metric}", f"{100 * summary['val_accuracy']:.2f} % (epoch {summary['best_epoch']})"),
        ("epochs", f"{summary['epochs']} in {seconds_text(summary['seconds'])}"),
        ("graph", f"{summary['dataset']}: {summary['nodes']:,} nodes, {summary['edges']:,} edges"),
        ("model", f"{summary['model']}: {summary['layers']} layers, {summary['parameters']:,} parameters"),
        ("parameters, gradients, optimizer", bytes_text(summary["state_bytes"])),
        ("largest drift", "nothing was reconstructed" if drift is None else f"{drift:.1e}"),
        ("device", f"{summary['device']} ({summary['device_name']}), {summary['precision']}"),
    ]
    peak, plain, expected = summary["peak_bytes"], summary["peak_bytes_plain"], summary["expected_bytes_plain"]
    seconds, seconds_plain = summary["seconds_per_epoch"], summary["seconds_per_epoch_plain"]
    kept = f"does not fit (about {bytes_text(expected)})" if plain is None and expected else bytes_text(plain)
    costs = [
        (
            "peak memory of a step",
            bytes_text(peak),
            kept,
            f"{plain / peak:.1f}x less" if peak and plain else "",
        ),
        (
            "seconds per epoch",
            seconds_text(seconds),
            seconds_text(seconds_plain),
            f"{seconds / seconds_plain:.2f}x the time" if seconds and seconds_plain else "",
        ),
    ]
    return facts, costs
