"""The training application: from a line of settings to a trained network, and a report of what it cost.

:func:`train` is what ``recollect train`` runs. Settings are written as Hydra's overrides; they have a group each for
dataset, model, optimizer, training and objective, and presets, which are rows of published results:
``preset=cora_gcn``. The loop runs on Lightning Fabric. ``training=full`` takes each step on the whole graph,
``training=autoscale`` on parts of it, with histories for what is around them, and ``training=wholegraph`` on all of it,
part by part; model, optimizer and loop are the same.
Evaluation is always that of the whole graph, and the test score that of the best validation epoch.

A run's folder is known by ``config.yaml``, which is there first, and finished by ``summary.json``, which is there last.
Between them a checkpoint is replaced, in one step, as often as takes a tenth of the time or as ``checkpoint_every``
says. It holds everything that the following epochs depend on; so a run that was killed goes on from there and, on the
CPU, ends with the numbers of an unbroken one. ``metrics.csv`` and TensorBoard's files are written anew from the
checkpoint when a run goes on. Several runs, ``runs=20``, have a folder each in one folder, ``seed_0`` and so on, and
their mean and standard deviation in its summary and report.

What needs torch is imported when it is first asked for: a wrong setting is told at once.

This package needs the ``[train]`` extra; nothing else in recollect imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recollect.train._command import command
from recollect.train._errors import InvalidRunError, NonFiniteLossError, TrainingError, UsageError
from recollect.train._run import train

if TYPE_CHECKING:
    from recollect.train._fit import FitResult, fit

__all__ = [
    "FitResult",
    "InvalidRunError",
    "NonFiniteLossError",
    "TrainingError",
    "UsageError",
    "command",
    "fit",
    "train",
]

_LATER = {"fit": "_fit", "FitResult": "_fit"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
