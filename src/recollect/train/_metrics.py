"""What a prediction is worth."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.autoscale import compute_micro_f1
from recollect.data import GraphDataset
from recollect.train._errors import TrainingError

__all__ = ["known_labels", "known_losses", "losses", "other_scores", "score", "scored"]

_NAMES = {"rocauc": "ROC-AUC", "average_precision": "average precision"}


def losses(task: str, logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each node [num_nodes], or the binary one of each label [num_nodes, num_classes].

    Args:
        task: ``"multiclass"`` or ``"multilabel"``.
        logits: [num_nodes, num_classes].
        target: classes [num_nodes] int64, or labels [num_nodes, num_classes] in {0, 1}; unknown ones, NaN, have the
            loss 0, and all others a factor with which the mean is that of the known ones.
    """
    each = known_losses(task, logits, target)
    return each if task == "multiclass" else each * (each.numel() / known_labels(task, target).clamp(min=1))


def known_losses(task: str, logits: Tensor, target: Tensor) -> Tensor:
    """Return the same, but without that factor: what is added up over parts of the nodes."""
    if task == "multiclass":
        return F.cross_entropy(logits, target, reduction="none")
    each = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(0.0).to(logits.dtype), reduction="none")
    return each * ~target.isnan()


def known_labels(task: str, target: Tensor) -> Tensor:
    """Return the number of losses that count: of nodes, or of labels that are known; an integer, on the device."""
    return torch.tensor(len(target)) if task == "multiclass" else (~target.isnan()).sum()


def score(graph: GraphDataset, logits: Tensor, part: str) -> float:
    """Score the logits by the graph's metric on one part of its split.

    Accuracy is the share of nodes whose class is right (multi-label: of labels that are right); micro-F1 counts labels
    over all nodes together; ROC-AUC and average precision are those of class 1 of two classes, or the mean over those
    labels that occur and are missing in the part, as the Open Graph Benchmark defines it. Unknown labels do not count.

    Args:
        graph: with the true labels, on the device of the logits.
        logits: [num_nodes, num_classes].
        part: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        A number from 0 to 1.

    Raises:
        TrainingError: ROC-AUC or average precision is asked for where no label both occurs and is missing.
    """
    return float(scored(graph, logits, graph.data[f"{part}_mask"].nonzero().flatten(), part))


def scored(graph: GraphDataset, logits: Tensor, rows: Tensor, part: str, metric: str | None = None) -> Tensor:
    """Return :func:`score`, or that by another metric, as a scalar on the rows of the part.

    Nothing waits for an accuracy.
    """
    metric = metric or graph.metric
    logits, y = logits[rows].float(), graph.data.y[rows]
    if metric == "accuracy":
        share: Tensor
        if graph.task == "multiclass":
            share = (logits.argmax(-1) == y).double().mean()
            return share
        known = ~y.isnan()
        share = (((logits > 0) == (y > 0.5)) & known).double().sum() / known.double().sum()
        return share
    logits, y = logits.cpu(), y.cpu()
    return torch.tensor(_by_counts(graph, logits, y, part, metric), dtype=torch.float64, device="cpu")


def other_scores(graph: GraphDataset, logits: Tensor, part: str) -> dict[str, float]:
    """Average precision and micro-F1 of a multi-label graph, but for the one that is its metric; else nothing.

    What is not defined on the part is left out; see `score`.
    """
    if graph.task != "multilabel":
        return {}
    rows = graph.data[f"{part}_mask"].nonzero().flatten()
    others = [metric for metric in ("average_precision", "micro_f1") if metric != graph.metric]
    scores = {}
    for metric in others:
        with contextlib.suppress(TrainingError):  # a label may be on all nodes of the part, or on none
            scores[metric] = float(scored(graph, logits, rows, part, metric))
    return scores


def _by_counts(graph: GraphDataset, logits: Tensor, y: Tensor, part: str, metric: str) -> float:
    if graph.task == "multiclass":
        if metric == "micro_f1":
            return compute_micro_f1(logits, y)
        if graph.num_classes != 2:
            name = _NAMES[metric]
            raise TrainingError(f"{name} of {graph.num_classes} exclusive classes is not defined: {graph.name!r}")
        values, true = (logits[:, 1] - logits[:, 0])[:, None], (y == 1)[:, None].float()
        return _mean_over_labels(metric, values, true, graph.name, part)
    if metric == "micro_f1":
        return compute_micro_f1(logits.masked_fill(y.isnan(), -1.0), y.nan_to_num(0.0))
    return _mean_over_labels(metric, logits, y, graph.name, part)


def _mean_over_labels(metric: str, values: Tensor, true: Tensor, graph: str, part: str) -> float:
    """The mean of a score of rankings over the labels [nodes, labels] that both occur and are missing."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    one = {"rocauc": roc_auc_score, "average_precision": average_precision_score}[metric]
    scores = []
    for k in range(true.size(1)):
        known = ~true[:, k].isnan()
        has, value = true[known, k] > 0.5, values[known, k]
        if bool(has.any()) and not bool(has.all()):
            scores.append(float(one(has.numpy(), value.numpy())))
    if not scores:
        raise TrainingError(
            f"{_NAMES[metric]} is not defined: each label is on all or on none of the {part} nodes of {graph!r}"
        )
    return sum(scores) / len(scores)
