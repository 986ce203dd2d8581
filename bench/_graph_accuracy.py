"""Test accuracy with histories and on the whole graph, by the same code, against the published figures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench._report import OTHER_PART, Target, show, table
from recollect.train import train

RAW_FILE = Path("Planetoid", "Cora", "raw", "ind.cora.x")
MODES = ("autoscale", "full")
# Mean and standard deviation in percent, "GNNAutoScale" (arXiv 2106.05609), Cora with histories.
PUBLISHED = {"gcn": (82.29, 0.76), "gat": (83.32, 0.62), "appnp": (83.19, 0.58), "gcn2": (85.52, 0.39)}
CLOSE = 0.5  # points
Row = dict[str, Any]


def measure_accuracy(
    root: Path, models: Sequence[str], runs: int, epochs: int | None = None, first_seed: int = 0
) -> Iterator[Row]:
    """Train each model on Cora both ways.

    Args:
        root: folder of the raw files.
        models: of `PUBLISHED`.
        runs: seeds for each.
        epochs: fewer than published, to try.
        first_seed: the others follow.

    Yields:
        For each model `test_accuracy` by mode (percent, one number for each seed), `mean`, `std` and `seconds`, also
        by mode.
    """
    for model in models:
        row: Row = {"model": model, "runs": runs, "epochs": epochs, "test_accuracy": {}, "seconds": {}}
        for mode in MODES:
            words = [f"preset=cora_{model}", f"training={mode}", f"data.root={root}", "measure.enabled=false"]
            words += [f"runs={runs}", f"seed={first_seed}"]
            words += [f"epochs={epochs}"] if epochs is not None else []
            with tempfile.TemporaryDirectory() as folder:
                summary = train([*words, f"run_dir={Path(folder) / 'run'}"])
            results = summary["results"] if runs > 1 else [summary]
            row["test_accuracy"][mode] = [100 * result["test_accuracy"] for result in results]
            row["seconds"][mode] = summary["seconds"]
        row["mean"] = {mode: statistics.fmean(found) for mode, found in row["test_accuracy"].items()}
        row["std"] = {
            mode: statistics.stdev(found) if runs > 1 else None for mode, found in row["test_accuracy"].items()
        }
        yield row


def accuracy_table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        mean, std = PUBLISHED[row["model"]]
        cells = [f"{row['mean'][mode]:.2f} ({show(row['std'][mode], '.2f')})" for mode in MODES]
        body.append([row["model"], str(row["runs"]), *cells, f"{mean:.2f} ({std:.2f})"])
    return table(["Cora, %", "seeds", "histories", "whole graph", "published, histories"], body)


def accuracy_targets(rows: Sequence[Row]) -> list[Target]:
    """Hold the means against the numbers to reach: points that are missing, at most."""
    found = {row["model"]: row for row in rows if row["epochs"] is None}
    tried = {row["model"] for row in rows}
    targets = []
    for model, (mean, std) in PUBLISHED.items():
        ours = found[model]["mean"] if model in found else None
        why = "with other epochs than published" if model in tried else OTHER_PART
        targets += [
            Target(
                f"{model}: points that histories lose against the whole graph",
                ours["full"] - ours["autoscale"] if ours else None,
                CLOSE,
                why_not_measured=why,
            ),
            Target(
                f"{model}: points below the published mean, with histories",
                mean - ours["autoscale"] if ours else None,
                std,
                why_not_measured=why,
            ),
        ]
    return targets
