"""A graph that is given as an object, as the graph of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from recollect.data import GraphDataset, InvalidFileError, from_data
from recollect.train._errors import UsageError

__all__ = ["as_dataset", "in_type_of"]


def as_dataset(data: Any, seed: int, console: Console) -> GraphDataset:
    """Check a graph, and make what it lacks, as `recollect.data.from_data` does.

    Classes keep their numbers: a model has an output for each from 0 on, whether a node has it or not. What else the
    graph holds stays in it.

    Args:
        data: a ``Data`` of torch_geometric, in which a class of -1 is unknown, or a graph of `recollect.data`, which
            is returned as it is.
        seed: of the split.
        console: where it is told what was made.

    Raises:
        UsageError: something is missing or does not fit; the message says what and how it must be.
    """
    if isinstance(data, GraphDataset):
        return data
    try:
        given, task = _labelled(data)
        graph = from_data(given, name="the graph", task=task, seed=seed)
    except InvalidFileError as error:
        raise UsageError(str(error)) from error
    if graph.num_splits > 1:
        raise UsageError(
            f"train_mask, val_mask and test_mask hold {graph.num_splits} splits, and a run is of one: give one column "
            "of each, data.train_mask = data.train_mask[:, k] and so on; or recollect.data.from_data(data, split=k)"
        )
    for part in ("train", "val", "test"):
        mask = graph.data[f"{part}_mask"]
        if not bool(mask.any()):
            raise UsageError(
                f"{part}_mask has none of the {mask.numel()} nodes: a run trains on some, chooses the best epoch by "
                "others, and is judged by yet others; give each some nodes, or no masks, and more labelled nodes"
            )
    for note in graph.notes:
        console.print(note, highlight=False)
    made, classes = data.clone().cpu(), graph.num_classes
    if graph.task == "multiclass":
        numbers = torch.tensor([int(name) for name in graph.class_names])
        graph.data.y = torch.where(graph.data.y < 0, -1, numbers[graph.data.y])
        classes = int(numbers.max()) + 1
    if "adj_t" in made:
        del made.adj_t  # the graph has its edges, and their weights, in the order of its rows
    for name, value in graph.data.to_dict().items():
        made[name] = value
    return replace(graph, name="data", data=made, num_classes=classes)


def in_type_of(model: nn.Module, graph: GraphDataset) -> GraphDataset:
    """Give a graph's features and weights the type of the parameters, if these have one; labels stay what they are."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(types) != 1 or types == {graph.data.x.dtype}:
        return graph
    data, dtype = graph.data.clone(), types.pop()
    for name in ("x", "edge_attr", "edge_weight"):
        value = data.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            data[name] = value.to(dtype)
    return replace(graph, data=data)


def _labelled(data: Any) -> tuple[Any, Literal["multilabel", "auto"]]:
    """The graph with NaN where a class is -1; and whether its labels can be columns of zeros and ones alone."""
    y = getattr(data, "y", None)
    if not isinstance(y, Tensor) or y.ndim > 2:
        return data, "auto"
    if y.ndim == 2 and y.size(1) == 1:
        raise UsageError(
            f"y is {list(y.shape)}, a class for each node or one label that is there or not: give y.view(-1) for "
            "classes; one label alone is two classes"
        )
    if y.ndim == 2:
        return data, "multilabel"
    data = data.clone()
    data.y = y.double().masked_fill(y == -1, torch.nan)
    return data, "auto"
