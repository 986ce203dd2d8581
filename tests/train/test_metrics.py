from __future__ import annotations

import pytest
import torch
from sklearn.metrics import f1_score

from recollect.train._errors import TrainingError
from recollect.train._metrics import losses, other_scores, score


def pairs_in_order(values: list[float], true: list[bool]) -> float:
    """ROC-AUC by its meaning: the share of (positive, negative) pairs that are in order, ties half."""
    positive = [v for v, t in zip(values, true, strict=True) if t]
    negative = [v for v, t in zip(values, true, strict=True) if not t]
    return sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))


def logits_for(graph, columns: int) -> torch.Tensor:
    return torch.randn(graph.data.num_nodes, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_accuracy_counts_right_nodes(graph_maker, part):
    graph = graph_maker("multiclass", "accuracy", 3)
    logits = logits_for(graph, 3)
    nodes = graph.data[f"{part}_mask"].nonzero().flatten().tolist()
    right = [logits[i].tolist().index(max(logits[i].tolist())) == int(graph.data.y[i]) for i in nodes]
    assert score(graph, logits, part) == sum(right) / len(right)


def test_accuracy_of_labels_counts_right_labels(graph_maker):
    graph = graph_maker("multilabel", "accuracy", 4)
    logits, mask = logits_for(graph, 4), graph.data.val_mask
    right = [(a > 0) == (b == 1) for a, b in zip(logits[mask].flatten(), graph.data.y[mask].flatten(), strict=True)]
    assert score(graph, logits, "val") == sum(map(bool, right)) / len(right)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_micro_f1_is_scikit_learns(graph_maker, task):
    graph = graph_maker(task, "micro_f1", 3)
    logits, mask = logits_for(graph, 3), graph.data.test_mask
    predicted = logits[mask].argmax(-1) if task == "multiclass" else logits[mask] > 0
    expected = f1_score(graph.data.y[mask], predicted, average="micro")
    assert score(graph, logits, "test") == pytest.approx(expected, abs=1e-12)


def test_micro_f1_of_nothing_is_zero(graph_maker):
    graph = graph_maker("multilabel", "micro_f1", 3)
    graph.data.y.zero_()
    assert score(graph, -torch.ones(12, 3), "val") == 0


def test_binary_rocauc_ranks_the_second_class(graph_maker):
    graph = graph_maker("multiclass", "rocauc", 2)
    logits, mask = logits_for(graph, 2), graph.data.val_mask
    values = (logits[mask, 1] - logits[mask, 0]).tolist()
    expected = pairs_in_order(values, (graph.data.y[mask] == 1).tolist())
    assert score(graph, logits, "val") == pytest.approx(expected, abs=1e-12)
    assert score(graph, -logits, "val") == pytest.approx(1 - expected, abs=1e-12)


def test_rocauc_of_labels_is_a_mean_over_those_that_are_defined(graph_maker):
    graph = graph_maker("multilabel", "rocauc", 4)
    graph.data.y[graph.data.val_mask, 1] = 1.0  # nothing to rank in this label
    logits, mask = logits_for(graph, 4), graph.data.val_mask
    y = graph.data.y[mask]
    defined = [k for k in range(4) if 0 < y[:, k].sum() < len(y)]
    assert 0 < len(defined) < 4
    expected = [pairs_in_order(logits[mask, k].tolist(), (y[:, k] == 1).tolist()) for k in defined]
    assert score(graph, logits, "val") == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_rocauc_without_a_label_to_rank_is_refused(graph_maker):
    graph = graph_maker("multilabel", "rocauc", 2)
    graph.data.y.fill_(1.0)
    with pytest.raises(TrainingError, match=r"not defined.*val nodes of 'ring'"):
        score(graph, torch.zeros(12, 2), "val")


def test_rocauc_of_three_exclusive_classes_is_refused(graph_maker):
    with pytest.raises(TrainingError, match="3 exclusive classes"):
        score(graph_maker("multiclass", "rocauc", 3), torch.zeros(12, 3), "val")


def test_average_precision_is_the_mean_over_labels_of_the_area_under_precision_and_recall(graph_maker):
    graph = graph_maker("multilabel", "average_precision", 3)
    logits = logits_for(graph, 3)
    graph.data.y[4, 0] = torch.nan  # a node of validation
    expected = []
    for k in range(3):
        nodes = [
            i for i in graph.data.val_mask.nonzero().flatten().tolist() if graph.data.y[i, k] == graph.data.y[i, k]
        ]
        order = sorted(nodes, key=lambda i: -float(logits[i, k]))
        has = [bool(graph.data.y[i, k] == 1) for i in order]
        if any(has) and not all(has):
            expected.append(sum(sum(has[: j + 1]) / (j + 1) for j, h in enumerate(has) if h) / sum(has))
    assert score(graph, logits, "val") == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert other_scores(graph, logits, "val").keys() == {"micro_f1"}
    assert other_scores(graph_maker("multiclass", "accuracy", 3), logits, "val") == {}


@pytest.mark.parametrize("metric", ["accuracy", "micro_f1", "rocauc"])
def test_unknown_labels_do_not_count(graph_maker, metric):
    graph, whole = graph_maker("multilabel", metric, 1), graph_maker("multilabel", metric, 1)
    graph.data.y[0] = torch.nan
    whole.data.train_mask[0] = False
    for k, value in ((3, 1.0), (6, 0.0), (9, 1.0)):  # the training nodes beside node 0
        graph.data.y[k] = whole.data.y[k] = value
    logits = logits_for(graph, 1)
    assert score(graph, logits, "train") == score(whole, logits, "train")


def test_the_mean_loss_is_that_of_the_known_labels(graph_maker):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.randint(2, (6, 4), generator=torch.Generator().manual_seed(1)).double()
    unknown = torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) < 0.3
    known = [(i, k) for i in range(6) for k in range(4) if not unknown[i, k]]
    expected = sum(torch.log1p(torch.exp(-(2 * target[i, k] - 1) * logits[i, k])) for i, k in known) / len(known)
    found = losses("multilabel", logits, target.masked_fill(unknown, torch.nan)).mean()
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients)
