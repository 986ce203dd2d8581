"""The one shape in which every graph arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from recollect.data._errors import InvalidRawFilesError
from recollect.data._foreign import require

if TYPE_CHECKING:
    from torch_geometric.data import Data

Task = Literal["multiclass", "multilabel"]
Metric = Literal["accuracy", "rocauc", "micro_f1", "average_precision"]


@dataclass(frozen=True, eq=False)
class GraphDataset:
    """A graph with features, labels and a split.

    Attributes:
        name: The name that it was loaded by.
        data: N nodes and E directed edges: ``x`` [N, F] float32; ``edge_index`` [2, E] int64; ``y`` [N]
            int64 for multiclass, [N, K] float32 of zeros and ones for multilabel; ``train_mask``,
            ``val_mask`` and ``test_mask`` [N] bool; ``edge_attr`` [E, D] float32 where the graph has edge
            features; ``edge_weight`` [E] float32 where it has weights. Unknown labels are -1, or NaN if multilabel.
        task: What a label is: one class of ``num_classes``, or any subset of ``num_classes`` labels.
        num_classes: Classes, or labels if multilabel.
        metric: What the graph's literature reports. ``"rocauc"`` on a multiclass graph means that it has two
            classes, and that class 1 is the positive one.
        num_splits: How many splits the graph's literature averages over; the option ``split`` chooses one by its
            number, if there are several.
        learnt_features: ``x`` holds random vectors for a network to begin with, which learns them.
        notes: What was made, or not used, when a file was read.
        node_ids: What the file calls the nodes, N of them; None if that is their number.
        class_names: What the file calls the classes; empty where they have no names.

    Example:
        >>> from recollect.data import load
        >>> graph = load("karate")
        >>> graph.data.x.shape, graph.data.y.shape, graph.num_classes, graph.metric
        (torch.Size([34, 34]), torch.Size([34]), 4, 'accuracy')
    """

    name: str
    data: Data
    task: Task
    num_classes: int
    metric: Metric
    num_splits: int = 1
    learnt_features: bool = False
    notes: tuple[str, ...] = ()
    node_ids: tuple[str, ...] | None = None
    class_names: tuple[str, ...] = ()


def assemble(
    name: str,
    *,
    x: Tensor,
    edge_index: Tensor,
    y: Tensor,
    masks: tuple[Tensor, Tensor, Tensor],
    num_classes: int,
    task: Task = "multiclass",
    metric: Metric = "accuracy",
    edge_attr: Tensor | None = None,
    edge_weight: Tensor | None = None,
    num_splits: int = 1,
    learnt_features: bool = False,
    notes: tuple[str, ...] = (),
    node_ids: tuple[str, ...] | None = None,
    class_names: tuple[str, ...] = (),
) -> GraphDataset:
    """Bring a source's tensors into the dtypes and shapes that `GraphDataset` promises.

    Args:
        name: The name that the graph was loaded by.
        x: [N, F], any real dtype.
        edge_index: [2, E], any integer dtype.
        y: [N] or [N, 1] for multiclass, [N, K] for multilabel.
        masks: Train, validation and test, each [N] bool.
        num_classes: Classes, or labels if multilabel.
        task: See `GraphDataset`.
        metric: See `GraphDataset`.
        edge_attr: [E, D] or None.
        edge_weight: [E] or None.
        num_splits: See `GraphDataset`.
        learnt_features: See `GraphDataset`.
        notes: See `GraphDataset`.
        node_ids: See `GraphDataset`.
        class_names: See `GraphDataset`.

    Raises:
        InvalidRawFilesError: An edge names a node that is not there, or a label a class: nothing checks that later.
    """
    data_module = require("torch_geometric.data", extra="graph")
    y = y.to(torch.float32) if task == "multilabel" else y.reshape(-1).to(torch.int64)
    train, val, test = masks
    _check_numbers(name, edge_index, x.size(0), "the node")
    if task == "multiclass":
        _check_numbers(name, y[train | val | test], num_classes, "the class")
    data = data_module.Data(
        x=x.to(torch.float32).contiguous(),
        edge_index=edge_index.to(torch.int64).contiguous(),
        y=y.contiguous(),
        train_mask=train.contiguous(),
        val_mask=val.contiguous(),
        test_mask=test.contiguous(),
    )
    if edge_attr is not None:
        data.edge_attr = edge_attr.to(torch.float32).contiguous()
    if edge_weight is not None:
        data.edge_weight = edge_weight.to(torch.float32).contiguous()
    return GraphDataset(
        name, data, task, num_classes, metric, num_splits, learnt_features, notes, node_ids, class_names
    )


def _check_numbers(name: str, numbers: Tensor, count: int, what: str) -> None:
    if numbers.numel() and not ((low := int(numbers.min())) >= 0 and (high := int(numbers.max())) < count):
        wrong = low if low < 0 else high
        raise InvalidRawFilesError(
            f"the files of {name!r} name {what} {wrong}, and there are {count}, numbered from 0; replace the files"
        )
