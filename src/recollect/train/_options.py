"""The options of each group, and presets: rows of published results. What nobody says is as in the first of each group.

``presets.csv`` has a line for each graph and network; a cell is a value of the key above it, and an empty one leaves
the value of the group's option. All share Adam, all epochs at one learning rate, and parts by METIS (arXiv 2106.05609).
The column ``row`` says where the numbers are from: ``own`` are the published ones of this graph and network, else they
are those of the row that is named (of networks with histories of several orders, with fewer channels where there are
many aggregations).

Of the large graphs (those with ``training.layerwise``) layers, channels, dropout, parts, learning rate and epochs are
published; batch norm, no dropout of the features, no weight decay, features with mean 0 and deviation 1 and five runs
are what is usual on them.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]

from recollect.train._settings import (
    DatasetSettings,
    ImportSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RevGNNSettings,
    ScalableSettings,
    TrainingSettings,
)

__all__ = ["OPTIONS", "preset", "rows"]

_STORED = {"download": False}
_SPLIT = (
    *("coauthor-cs", "coauthor-physics", "amazon-computers", "amazon-photo", "wikics", "actor", "chameleon"),
    *("squirrel", "amazon-ratings", "minesweeper", "questions", "roman-empire", "tolokers"),
)
_GRAPHS: dict[str, dict[str, Any]] = {
    "digits": {"k": 10},
    "karate": {},
    "sbm": {
        **{"num_nodes": 10000, "num_classes": 10, "average_degree": 10.0, "homophily": 0.8, "num_features": 64},
        **{"noise": 1.0, "num_labels": 0},
    },
    **{name: {"split": "public", **_STORED} for name in ("cora", "citeseer", "pubmed")},
    **{name: {"split": 0, **_STORED} for name in _SPLIT},
    **{name: dict(_STORED) for name in ("reddit", "ppi", "flickr", "yelp", "ogbn-products", "ogbn-proteins")},
    "ogbn-arxiv": {"undirected": True, **_STORED},
    "file": {"task": "auto", "split": 0, "undirected": False},  # one's own, from dataset.path
}

_PLAIN = {"batch_norm": False, "residual": False}
_NORMED = {"drop_input": False, "batch_norm": True, "residual": False}
_GEN: dict[str, Any] = {"conv": "gen", "conv_kwargs": {"aggr": "max"}, "edge_features": True}
_AGGREGATIONS = {"aggregators": ["mean", "max", "min", "std"], "scalers": ["identity", "amplification", "attenuation"]}
_KEPT = {"drop_input": False, **_PLAIN}
_DROPPED = {"drop_input": True, **_PLAIN}
_BETAS = {"betas": [0.9, 0.999], "eps": 1e-8}

_MODELS = [
    # Small enough to train on two CPU cores in well under a minute, deep enough to show what depth costs.
    RevGNNSettings("revgnn", 64, 32, 0.1, "revgnn"),
    # For citation graphs (cora, citeseer, pubmed), which have few labels: graph convolutions and much dropout.
    RevGNNSettings("revgnn_gcn", 64, 32, 0.5, "revgnn", conv="gcn"),
    # The 112 x 64 network that arXiv 2106.07476 compares with a residual one of the same size on ogbn-proteins.
    RevGNNSettings("revgnn_112", 112, 64, 0.1, "revgnn", **_GEN),
    # Its WT-RevGNN: all layers share one set of parameters.
    RevGNNSettings("revgnn_tied", 112, 64, 0.1, "revgnn", **_GEN, tied=True),
    # Its RevGNN-Deep and RevGNN-Wide, made for ogbn-proteins (there with optimizer=adam, lr 1e-3).
    RevGNNSettings("revgnn_deep", 1001, 80, 0.1, "revgnn", **_GEN),
    RevGNNSettings("revgnn_wide", 448, 224, 0.2, "revgnn", **_GEN),
    # The network of torch_geometric's ogbn-products example (there with optimizer=adam, lr 3e-3).
    RevGNNSettings("revgnn_products", 112, 160, 0.5, "revgnn"),
    # Kipf and Welling (arXiv 1609.02907), and so on down to GCNII: with the numbers of arXiv 2106.05609 for citation
    # graphs (GCNII: for Cora).
    ScalableSettings("gcn", 2, 16, 0.5, "gcn", "symmetric", {**_DROPPED, "linear": False}),
    # Velickovic et al. (arXiv 1710.10903).
    ScalableSettings("gat", 2, 8, 0.6, "gat", "loops", {"hidden_heads": 8, "out_heads": 1, **_PLAIN}),
    # Klicpera et al. (arXiv 1810.05997).
    ScalableSettings("appnp", 10, 64, 0.5, "appnp", "symmetric", {"alpha": 0.1}),
    # Chen et al. (arXiv 2007.02133).
    ScalableSettings(
        *("gcn2", 64, 64, 0.6, "gcn2", "symmetric"), {"alpha": 0.1, "theta": 0.5, "shared_weights": True, **_DROPPED}
    ),
    # Corso et al. (arXiv 2004.05718); and with the outputs of all layers side by side before the last (jumping
    # knowledge, arXiv 1806.03536).
    ScalableSettings("pna", 3, 64, 0.5, "pna", "plain", {**_AGGREGATIONS, **_NORMED}),
    ScalableSettings("pna_jk", 3, 64, 0.5, "pna_jk", "plain", {**_AGGREGATIONS, **_NORMED}),
    # Xu et al. (arXiv 1810.00826).
    ScalableSettings("gin", 4, 64, 0.5, "gin", "plain", {"noise": 0.0, **_KEPT}),
    # A network of your own: model.target=MODULE:NAME makes it. See `recollect.train.fit` for how it is called.
    ImportSettings("import", None, None, None, "import"),
]

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dataset": {name: DatasetSettings(name, options) for name, options in _GRAPHS.items()},
    "model": {model.name: model for model in _MODELS},
    "objective": {name: ObjectiveSettings(name) for name in ("mean", "iwrm", "multitask")},
    "optimizer": {
        "adamw": OptimizerSettings("adamw", 0.005, 0.0001, options=_BETAS),
        "adam": OptimizerSettings("adam", 0.001, options=_BETAS),
        "sgd": OptimizerSettings("sgd", 0.1, options={"momentum": 0.9, "nesterov": False}),
    },
    "training": {name: TrainingSettings(name) for name in ("full", "autoscale", "wholegraph")},
}
"""Group -> option -> the group's settings; the first option is taken where nobody says another."""


@functools.cache
def rows() -> Mapping[str, Mapping[str, str]]:
    """The lines of the table by the preset's name."""
    lines = (resources.files("recollect.train") / "presets.csv").read_text().splitlines()
    return {f"{row['dataset']}_{row['model']}": row for row in csv.DictReader(lines)}


def preset(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The options of groups and the values of keys that a line of the table has."""
    row = rows()[name]
    options = {"dataset": row["dataset"], "model": row["model"], "optimizer": "adam", "training": "autoscale"}
    values = {key: yaml.safe_load(cell) for key, cell in row.items() if cell and key not in (*options, "row")}
    return options, {"patience": None, "warmup_epochs": 0, **values}
