"""What a prediction is worth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.autoscale import compute_micro_f1
from recollect.data import GraphDataset
from recollect.train._errors import TrainingError

__all__ = ["losses", "score", "scored"]


def losses(task: str, logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each node [num_nodes], or the binary one of each label [num_nodes, num_classes].

    Args:
        task: ``"multiclass"`` or ``"multilabel"``.
        logits: [num_nodes, num_classes].
        target: classes [num_nodes] int64, or labels [num_nodes, num_classes] in {0, 1}.
    """
    if task == "multiclass":
        return F.cross_entropy(logits, target, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")


def score(graph: GraphDataset, logits: Tensor, part: str) -> float:
    """Score the logits by the graph's metric on one part of its split.

    Accuracy is the share of nodes whose class is right (multi-label: of labels that are right); micro-F1 counts labels
    over all nodes together; ROC-AUC is that of class 1 of two classes, or the mean over those labels that occur and
    are missing in the part, as the Open Graph Benchmark defines it.

    Args:
        graph: with the true labels, on the device of the logits.
        logits: [num_nodes, num_classes].
        part: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        A number from 0 to 1.

    Raises:
        TrainingError: ROC-AUC is asked for where no label both occurs and is missing.
    """
    return float(scored(graph, logits, graph.data[f"{part}_mask"].nonzero().flatten(), part))


def scored(graph: GraphDataset, logits: Tensor, rows: Tensor, part: str) -> Tensor:
    """Return :func:`score` as a scalar, on the rows of the part; nothing waits for an accuracy."""
    logits, y = logits[rows].float(), graph.data.y[rows]
    if graph.metric == "accuracy":
        right = logits.argmax(-1) == y if graph.task == "multiclass" else (logits > 0) == (y > 0.5)
        share: Tensor = right.double().mean()
        return share
    logits, y = logits.cpu(), y.cpu()
    return torch.tensor(_by_counts(graph, logits, y, part), dtype=torch.float64, device="cpu")


def _by_counts(graph: GraphDataset, logits: Tensor, y: Tensor, part: str) -> float:
    if graph.metric == "micro_f1":
        return compute_micro_f1(logits, y)
    if graph.task == "multiclass":
        if graph.num_classes != 2:
            raise TrainingError(f"ROC-AUC of {graph.num_classes} exclusive classes is not defined: {graph.name!r}")
        return _rocauc((logits[:, 1] - logits[:, 0])[:, None], (y == 1)[:, None], graph.name, part)
    return _rocauc(logits, y > 0.5, graph.name, part)


def _rocauc(values: Tensor, true: Tensor, name: str, part: str) -> float:
    from sklearn.metrics import roc_auc_score

    areas = [
        float(roc_auc_score(true[:, k].numpy(), values[:, k].numpy()))
        for k in range(true.size(1))
        if bool(true[:, k].any()) and not bool(true[:, k].all())
    ]
    if not areas:
        raise TrainingError(f"ROC-AUC is not defined: each label is on all or on none of the {part} nodes of {name!r}")
    return sum(areas) / len(areas)
