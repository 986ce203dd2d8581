"""Rows of published results: a table of settings, and Hydra's group ``preset`` made of it.

``conf/presets.csv`` has a line for each graph and network; a cell is a value of the key above it, and an empty one
leaves the value of the group's option. All share Adam, all epochs at one learning rate, and parts by METIS (arXiv
2106.05609). The column ``row`` says where the numbers are from: ``own`` are the published ones of this graph and
network, else they are those of the row that is named (of networks with histories of several orders, with fewer channels
where there are many aggregations).

Of the large graphs (those with ``training.layerwise``) layers, channels, dropout, parts, learning rate and epochs are
published; batch norm, no dropout of the features, no weight decay, features with mean 0 and deviation 1 and five runs
are what is usual on them.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore

__all__ = ["preset_names", "store_presets"]

_SHARED = {"patience": None, "warmup_epochs": 0}
_GROUPS = {"optimizer": "adam", "training": "autoscale"}


def preset_names() -> list[str]:
    """The options of the group, sorted."""
    return sorted(_table())


def store_presets(names: Iterable[str]) -> None:
    """Make options of the group known to Hydra; all of them would take a third of the time of a composition."""
    for name in names:
        ConfigStore.instance().store(group="preset", name=name, node=_node(name, _table()[name]), package="_global_")


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    lines = (resources.files("recollect.train.conf") / "presets.csv").read_text().splitlines()
    return {f"{row['dataset']}_{row['model']}": row for row in csv.DictReader(lines)}


def _node(name: str, row: dict[str, str]) -> dict[str, Any]:
    chosen = {"dataset": row["dataset"], "model": row["model"], **_GROUPS}
    node: dict[str, Any] = {"defaults": [{f"override /{group}": option} for group, option in chosen.items()]}
    node |= {"preset": name, **_SHARED}
    for key, cell in row.items():
        if cell and key not in (*chosen, "row"):
            *parents, last = key.split(".")
            inside = node
            for parent in parents:
                inside = inside.setdefault(parent, {})
            inside[last] = yaml.safe_load(cell)
    return node
