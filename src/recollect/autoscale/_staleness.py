"""How wrong histories are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale._adjacency import adjacency_of
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._inference import LayerWise, Tables, evaluating
from recollect.autoscale._making import fresh_histories
from recollect.autoscale._scalable import ScalableGNN
from recollect.autoscale._stamp import GraphStamp, check_graph
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._sub_data import SubData

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
            two more tables in host memory.

    Returns:
        A number for each layer but the last; 0 is exact, 1 is as wrong as zeros.

    Raises:
        ValueError: it is not the graph of the histories.
        RuntimeError: the network was made with ``keep_histories=False``.
    """
    with evaluating(model):
        if hasattr(data, "x"):
            return _errors_of_graph(model, data)
        return _errors_of_batches(model, data)


def _errors_of_graph(model: ScalableGNN, data: Any) -> list[float]:
    if data.x.size(0) != model.num_nodes:
        raise ValueError(f"data has {data.x.size(0)} nodes, but the histories have {model.num_nodes}")
    errors: list[float] = []

    def compare(layer: int, rows: Tensor) -> Tensor:
        errors.append(_error(model.tables[layer], torch.split(rows, _ROWS_AT_ONCE)))
        return rows

    adj_t = adjacency_of(data)
    check_graph(model.tables, GraphStamp.of(adj_t))
    inputs = {name: data[name] for name in model.inputs}
    model.run_layers(data.x, adj_t, inputs, compare)
    return errors


def _errors_of_batches(model: ScalableGNN, loader: Iterable[SubData]) -> list[float]:
    fresh: list[Any] = fresh_histories(model.tables, model.parameters())
    errors: list[float] = []

    def tables_for(graph: GraphStamp | None) -> Tables:
        check_graph(model.tables, graph)
        return Tables(model.num_nodes, fresh, Exchange(), passing=True)

    def compare(layer: int) -> None:
        errors.append(_error(model.tables[layer], _rows_of(fresh[layer])))

    LayerWise(model, loader, tables_for).run(torch.device("cpu"), compare)
    return errors


def _rows_of(history: History) -> Iterator[Tensor]:
    for n_id in torch.split(torch.arange(history.num_embeddings, device="cpu"), _ROWS_AT_ONCE):
        yield history.pull(n_id)


def _error(history: History, true: Iterable[Tensor]) -> float:
    """Compare in pieces: a history may be larger than memory."""
    wrong = total = 0.0
    for found, rows in zip(_rows_of(history), true, strict=True):
        exact = rows.to(torch.float64)
        wrong += float((found.to(exact) - exact).square().sum())
        total += float(exact.square().sum())
    if total == 0:
        return 0.0 if wrong == 0 else float("inf")
    return math.sqrt(wrong / total)
