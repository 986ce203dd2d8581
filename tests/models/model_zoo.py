"""Every model with histories, with each of its options, and graphs to run it on; all in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.autoscale import ScalableGNN, add_self_loops, normalize, permute, to_adj_t
from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA, PNA_JK

Data: Any = pytest.importorskip("torch_geometric.data").Data

IN, OUT, NODES = 5, 3, 24
AGGREGATORS = ["max", "mean", "min", "std", "sum", "var"]
SCALERS = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]

_MODELS: dict[str, tuple[type[ScalableGNN], dict[str, Any]]] = {
    "gcn": (GCN, {}),
    "gcn-one-layer": (GCN, {"num_layers": 1}),
    "gcn-widths": (GCN, {"hidden_channels": [4, 7]}),
    "gcn-linear": (GCN, {"linear": True, "drop_input": False}),
    "gcn-all": (GCN, {"linear": True, "batch_norm": True, "residual": True}),
    "gcn-bare-all": (GCN, {"batch_norm": True, "residual": True}),
    "gat": (GAT, {"hidden_heads": 2, "out_heads": 3}),
    "gat-all": (GAT, {"hidden_heads": 4, "hidden_channels": 2, "batch_norm": True, "residual": True}),
    "gcn2": (GCN2, {}),
    "gcn2-all": (GCN2, {"shared_weights": False, "batch_norm": True, "residual": True, "drop_input": False}),
    "appnp": (APPNP, {"num_layers": 5, "alpha": 0.2}),
    "pna": (PNA, {"aggregators": AGGREGATORS, "scalers": ["identity"]}),
    "pna-scalers": (PNA, {"aggregators": ["mean"], "scalers": SCALERS, "batch_norm": True, "residual": True}),
    "pna-edges": (PNA, {"aggregators": AGGREGATORS, "scalers": ["attenuation"], "edge_dim": 2}),
    "pna-jk": (PNA_JK, {"aggregators": ["max", "sum"], "scalers": ["identity"]}),
    "pna-jk-all": (
        PNA_JK,
        {"aggregators": ["mean"], "scalers": ["linear"], "batch_norm": True, "residual": True, "edge_dim": 2},
    ),
    "gin": (GIN, {}),
    "gin-all": (GIN, {"batch_norm": True, "residual": True, "drop_input": True, "noise": 0.1}),
}
every_model = pytest.mark.parametrize("name", list(_MODELS))


def make_graph(seed: int = 0, num_nodes: int = NODES) -> Any:
    """A directed graph with two isolated nodes, a self-loop, edge attributes; in the order of `PTR`'s parts."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes - 2, (2, 4 * num_nodes), generator=generator)
    edge_index[:, 0] = 3
    edge_index = edge_index.unique(dim=1)
    data = Data(
        x=torch.randn(num_nodes, IN, dtype=torch.float64, generator=generator),
        y=torch.arange(num_nodes) % OUT,
        edge_index=edge_index,
        edge_weight=torch.ones(edge_index.size(1), dtype=torch.float64),
        edge_attr=torch.randn(edge_index.size(1), 2, dtype=torch.float64, generator=generator),
    )
    return to_adj_t(permute(data, torch.randperm(num_nodes, generator=generator), log=False))


PTR = torch.tensor([0, 7, 8, 8, 15, NODES])  # parts of many sizes, one of them empty


def make(name: str, **options: Any) -> ScalableGNN:
    """A model of the zoo, the same at every call."""
    kind, own = _MODELS[name]
    options = (
        {"num_nodes": NODES, "hidden_channels": 6, "num_layers": 3, "history_dtype": torch.float64} | own | options
    )
    if "aggregators" in options:
        options["deg"] = make_graph().adj_t.crow_indices().diff()
    torch.manual_seed(0)
    model = kind(**{"in_channels": IN, "out_channels": OUT} | options).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # statistics and scales that show when they are left out
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def data_for(model: ScalableGNN, data: Any = None) -> Any:
    """The graph as the model wants it: normalised, with self-loops, or as it is."""
    data = make_graph() if data is None else data
    prepare: Callable[[Tensor], Tensor] | None = None
    if isinstance(model, GCN | GCN2 | APPNP):
        prepare = normalize
    elif isinstance(model, GAT):
        prepare = add_self_loops
    if prepare is not None:
        data.adj_t = prepare(data.adj_t)
        del data.edge_attr  # of the edges there were before
    return data


def given(model: ScalableGNN, data: Any) -> dict[str, Tensor]:
    """The keyword arguments that the model takes beside x and adj_t."""
    return {name: data[name] for name in model.inputs}
