"""summary.json: what came out of a run, or of several."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import recollect
from recollect.train._files import write_text
from recollect.train._measure import Costs
from recollect.train._stored import check_summary, read_text
from recollect.train._trainer import Trainer

__all__ = ["Summary", "combine", "read_summary", "summarize", "write_summary"]

Summary = dict[str, Any]

_EACH = ("seed", "split", "test_accuracy", "val_accuracy", "best_epoch", "epochs", "seconds")


def summarize(trainer: Trainer, test_accuracy: float, costs: Costs) -> Summary:
    """Gather what a run gives.

    ``test_accuracy`` and ``val_accuracy`` are by the graph's ``metric``, at the best validation epoch; ``seconds`` are
    those of all epochs; ``peak_bytes`` is the measured peak of a training step above ``state_bytes`` (parameters,
    gradients, optimizer), the histories and the graph, ``peak_bytes_plain`` the same in the second of ``modes``: with
    every activation kept, or on the whole graph.
    """
    step, settings = trainer.step, trainer.settings
    device = step.fabric.device
    drifts = [row["drift"] for row in trainer.history if "drift" in row and row["drift"] == row["drift"]]
    return {
        "dataset": settings.dataset.label,
        "split": settings.dataset.options.get("split"),
        "model": settings.model.name,
        "preset": settings.preset,
        "training": settings.training.name,
        "objective": settings.objective.name,
        "conflict": _mean_of(trainer.history, "conflict"),
        "smallest_cosine": min((row["cosine"] for row in trainer.history if "cosine" in row), default=None),
        "layers": settings.model.num_layers,
        "parameters": sum(parameter.numel() for parameter in step.network.parameters()),
        "metric": step.graph.metric,
        "test_accuracy": test_accuracy,
        "val_accuracy": trainer.best["val_accuracy"],
        "best_epoch": trainer.best_epoch,
        "epochs": trainer.epoch,
        "seconds": sum(row["seconds"] for row in trainer.history),
        "largest_drift": max(drifts, default=None),
        **{"histories": None, "tables": None},
        **step.family.summarize(step.network, trainer.history, device),
        "memory_budget": None if step.plan is None else step.plan.summarize(),
        "modes": step.modes,
        "peak_bytes": costs.peak,
        "peak_bytes_plain": costs.peak_plain,
        "expected_bytes_plain": costs.expected_plain,
        "state_bytes": costs.state,
        "seconds_per_epoch": costs.seconds,
        "seconds_per_epoch_plain": costs.seconds_plain,
        "memory_against_depth": costs.curve,
        "nodes": step.graph.data.num_nodes,
        "edges": step.graph.num_edges,
        "seed": settings.seed,
        "precision": settings.precision,
        "device": device.type,
        "device_name": _name_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recollect": recollect.__version__,
    }


def combine(summaries: Sequence[Summary]) -> Summary:
    """Make one summary of several runs' that differ in seed and split.

    Scores are means, with sample standard deviations beside them; ``seconds`` and ``epochs`` are those of all runs;
    ``results`` has each run's own. All else is the first run's.
    """
    scores: Summary = {}
    for key in ("test_accuracy", "val_accuracy"):
        values = [summary[key] for summary in summaries]
        scores |= {key: statistics.fmean(values), f"{key}_std": statistics.stdev(values)}
    return {
        **summaries[0],
        **scores,
        **{key: sum(summary[key] for summary in summaries) for key in ("epochs", "seconds")},
        "results": [{key: summary[key] for key in _EACH} for summary in summaries],
    }


def write_summary(path: Path, summary: Summary) -> None:
    """Write the file, in one step."""
    write_text(path, json.dumps(summary, indent=2) + "\n")


def read_summary(path: Path) -> Summary:
    """Read a file that `write_summary` wrote.

    Raises:
        InvalidRunError: it is damaged.
    """
    return check_summary(read_text(path), path)


def _name_of(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.machine()
    name: Callable[[torch.device], str] | None = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else name(device)


def _mean_of(history: Sequence[dict[str, float]], key: str) -> float | None:
    values = [row[key] for row in history if key in row]
    return statistics.fmean(values) if values else None
