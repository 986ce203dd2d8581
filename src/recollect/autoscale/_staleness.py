"""How wrong histories are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale._adjacency import adjacency_of
from recollect.autoscale._inference import evaluating
from recollect.autoscale._scalable import ScalableGNN, TrueRows
from recollect.autoscale._stamp import GraphStamp, check_graph
from recollect.autoscale.histories._history import History

__all__ = ["history_errors"]

_ROWS_AT_ONCE = 65_536


def history_errors(model: ScalableGNN, data: Any) -> list[float]:
    """Return how wrong each history is: the relative L2 error of all its rows together.

    That is ||h - H|| / ||H|| where h is what the history holds and H what the layer gives with the model's present
    parameters, in evaluation mode and with exact neighbours (the quantity that theorem 2 of arXiv 2106.05609 bounds).
    The histories are not changed. The modes of the modules are as before afterwards.

    Args:
        model: the network.
        data: the whole graph, with ``x`` and ``adj_t`` (or an ``EdgeIndex`` as ``edge_index``) and what
            ``model.inputs`` names. Or an EvalSubgraphLoader: H is then computed layer by layer in mini-batches, with
            two more tables in host memory. Over ranks all of them call this together; a loader is of the nodes of this
            one, in as many mini-batches as every other has.

    Returns:
        A number for each layer but the last; 0 is exact, 1 is as wrong as zeros. Over ranks, of the rows of all.

    Raises:
        ValueError: it is not the graph of the histories.
        RuntimeError: the network was made with ``keep_histories=False``.

    Example:
        >>> from recollect.autoscale import EvalSubgraphLoader, get_data, history_errors, normalize, partition, permute
        >>> from recollect.models import GCN
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> data.adj_t = normalize(data.adj_t)
        >>> perm, ptr = partition(data.adj_t, 2, "contiguous", log=False)
        >>> data = permute(data, perm, log=False)
        >>> model = GCN(data.num_nodes, in_channels, 8, out_channels, num_layers=3)
        >>> history_errors(model, data)  # of histories that are zeros
        [1.0, 1.0]
        >>> _ = model(loader=EvalSubgraphLoader(data, ptr, log=False))  # fills them
        >>> max(history_errors(model, data)) < 1e-6
        True
    """
    with evaluating(model):
        if hasattr(data, "x"):
            return _errors_of_graph(model, data)
        errors: list[float] = []
        model.true_rows(data, lambda layer, true: errors.append(_error(model.tables[layer], true)))
        return errors


def _errors_of_graph(model: ScalableGNN, data: Any) -> list[float]:
    if data.x.size(0) != model.num_nodes:
        raise ValueError(f"data has {data.x.size(0)} nodes, but the histories have {model.num_nodes}")
    errors: list[float] = []

    def compare(layer: int, rows: Tensor) -> Tensor:
        here = torch.split(model.tables[layer].own_nodes, _ROWS_AT_ONCE)
        errors.append(_error(model.tables[layer], ((n_id, rows[n_id.to(rows.device)]) for n_id in here)))
        return rows

    adj_t = adjacency_of(data)
    check_graph(model.tables, GraphStamp.of(adj_t))
    inputs = {name: data[name] for name in model.inputs}
    model.run_layers(data.x, adj_t, inputs, compare)
    return errors


def _error(history: History, true: TrueRows) -> float:
    """Compare in pieces: a history may be larger than memory."""
    wrong = total = 0.0
    for n_id, rows in true:
        exact = rows.to(torch.float64)
        wrong += float((history.pull_own(n_id).to(exact) - exact).square().sum())
        total += float(exact.square().sum())
    if history.shares is not None:
        sums = torch.tensor([wrong, total], dtype=torch.float64, device=history.shares.ranks.place)
        wrong, total = history.shares.ranks.add_up(sums, "errors of a history").tolist()
    if total == 0:
        return 0.0 if wrong == 0 else float("inf")
    return math.sqrt(wrong / total)
