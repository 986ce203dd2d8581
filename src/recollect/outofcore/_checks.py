"""What a network and a graph must be for steps over parts to be those over the whole graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recollect._modules import check_unhooked
from recollect.autoscale import ScalableGNN
from recollect.messages import described
from recollect.models import RevGNN
from recollect.outofcore._crossing import device_of
from recollect.reversible import GroupAddRev

__all__ = [
    "check_graph",
    "check_layered",
    "check_network",
    "check_unweighted",
    "check_weighting",
    "in_order",
    "inputs_of",
]


def check_network(model: Any) -> None:
    """Check that a network is run as it is when its layers are computed one by one.

    Raises:
        TypeError: another kind of network.
        ValueError: it, or a layer, runs something else too; or it is on several devices.
    """
    if not isinstance(model, RevGNN):
        raise TypeError(f"model must be a recollect.models.RevGNN (got {type(model).__name__})")
    device_of(model)
    for method in ("forward", "_mask", "__call__"):
        if getattr(type(model), method) is not getattr(RevGNN, method):
            raise TypeError(
                f"{type(model).__name__} has its own {method}, which is not called when layers are computed part by "
                "part: override embed and classify, which go row by row, or give another conv"
            )
    for name, module in model.stages():
        if type(module) is not GroupAddRev:
            raise TypeError(f"{name} must be a recollect.reversible.GroupAddRev (got {type(module).__name__})")
    check_unhooked([("model", model), *model.stages()], backward=True)


def check_layered(model: Any) -> None:
    """Check that a network is run as it is when its layers are computed one by one.

    Raises:
        TypeError: another kind of network, or one that runs its layers in its own order.
        ValueError: hooks on it, which would not be called; or it is on several devices.
    """
    if not isinstance(model, ScalableGNN):
        raise TypeError(
            "model must be a recollect.models.RevGNN, or another recollect.autoscale.ScalableGNN (got "
            f"{type(model).__name__})"
        )
    device_of(model)
    for method in ("forward", "__call__", "run_layers", "run_layer"):
        if getattr(type(model), method) is not getattr(ScalableGNN, method):
            raise TypeError(
                f"{type(model).__name__} has its own {method}, which is not called when layers are computed part by "
                "part: write forward_layer, which goes over edges, and readout, which goes row by row"
            )
    check_unhooked([("model", model)], backward=True)


def check_graph(data: Any, inputs: tuple[str, ...]) -> None:
    """Check that a graph has what is needed, and that no gradient of it is asked for.

    Raises:
        TypeError: it is no graph.
        ValueError: something is missing, of another shape, or requires a gradient.
    """
    if not hasattr(data, "num_nodes") or not hasattr(data, "get"):
        raise TypeError(
            f"data is {described(data)}, but must be a graph with x, y and train_mask: a torch_geometric.data.Data"
        )
    missing = [name for name in ("x", "y", "train_mask") if name not in data]
    if missing:
        raise ValueError(f"data has no {', '.join(missing)}, but WholeGraph needs x, y and train_mask")
    if not data.num_nodes:
        raise ValueError("the graph has no nodes")
    if data.train_mask.dim() != 1:
        raise ValueError(
            f"data.train_mask must have one entry for each node (got shape {list(data.train_mask.shape)}): take one "
            "column, one split"
        )
    for name in ("x", *inputs):
        value = (
            data.adj_t.values() if name == "edge_weight" and name not in data and "adj_t" in data else data.get(name)
        )
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"data.{name} requires grad, but steps give gradients to the network's parameters alone")
        if value is None and not (name == "edge_weight" and "edge_index" in data):
            raise ValueError(
                f"data has no {name}, which {'inputs' if name in inputs else 'the network'} names: set it, a row for "
                "each edge, or leave it out"
            )


def check_unweighted(adj_t: Tensor) -> None:
    """Check that an adjacency whose weights convolutions are not given has none.

    Raises:
        ValueError: a weight is not 1.
    """
    if bool((adj_t.values() != 1).any()):
        raise ValueError(
            "the adjacency has weights other than 1, and the convolutions are given none; make the WholeGraph with "
            "inputs=('edge_weight',), which gives them to each convolution after edge_index, or the adjacency without "
            "weights"
        )


def inputs_of(model: ScalableGNN, given: Iterable[str], keep_every: int) -> tuple[str, ...]:
    """Return the names of what parts hold of each edge.

    Args:
        model: the network.
        given: the names that were given.
        keep_every: that was given.

    Raises:
        TypeError: another kind of network, or no names.
        ValueError: an argument is for the other kind.
    """
    inputs = (given,) if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(name, str) for name in inputs):
        raise TypeError(f"inputs is {given!r}, but must be a tuple of names, such as ('edge_weight',)")
    if isinstance(model, RevGNN):
        if keep_every != 1:
            raise ValueError(
                f"keep_every={keep_every} is for networks that keep layers' inputs, and those of a RevGNN come back by "
                "inversion: leave it out"
            )
        return inputs
    check_layered(model)
    if inputs:
        raise ValueError(
            f"inputs={inputs} are for the convolutions of a RevGNN; a {type(model).__name__} says in its attribute "
            f"inputs what its layers need beside the adjacency ({model.inputs})"
        )
    return ("edge_weight", *model.inputs)


def check_weighting(weighting: object) -> None:
    """Raise a TypeError unless this is ``None``, or can be called with a Gramian."""
    if isinstance(weighting, type) or not (weighting is None or callable(weighting)):
        found = f"the class {weighting.__name__}" if isinstance(weighting, type) else repr(weighting)
        raise TypeError(f"weighting must be an object that can be called, such as UPGradWeighting() (got {found})")


def in_order(data: Any, adj_t: Tensor) -> bool:
    """Return whether the edges into each node are in the same order in a graph's edge index as in its adjacency."""
    edge_index = data.get("edge_index") if "adj_t" not in data else None
    if edge_index is None:
        return True
    by_target = torch.argsort(edge_index[1], stable=True)
    return torch.equal(edge_index[0][by_target].cpu(), adj_t.col_indices().long().cpu())
