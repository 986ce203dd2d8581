"""Depth, graph and objectives on graphs with several labels: what each way of training scores, takes and keeps."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._graph_corrected_accuracy import score
from bench._harness import peak_bytes
from bench._report import show, table
from recollect.aggregation import MeanWeighting, UPGradWeighting, conflict
from recollect.autogram import Engine
from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, edge_index_of, partition, permute, to_adj_t
from recollect.data import load
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph

CPU = torch.device("cpu")
WAYS = ("whole graph, kept", "histories", "out of core")
OBJECTIVES = {"mean": MeanWeighting, "upgrad": UPGradWeighting}
SPECTRAL = 64  # features of a graph that has none
Row = dict[str, Any]
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Course:
    """What all ways have in common.

    Attributes:
        layers: L of a RevGNN with SAGE convolutions.
        epochs: passes over the graph.
        channels: of the layers.
        parts: that the graph is cut into; a step with histories takes a quarter of them, one out of core each quarter.
        lr: of Adam.
        dropout: in the layers.
    """

    layers: int
    epochs: int
    channels: int = 64
    parts: int = 16
    lr: float = 0.01
    dropout: float = 0.1


@dataclass(frozen=True)
class Graph:
    """A graph in the order of its parts.

    Attributes:
        name: of the graph.
        data: with ``adj_t``.
        ptr: bounds of the parts [parts + 1].
        edge_index: the edges in the form that whole graphs take [2, edges].
        labels: m, each of which is an objective.
    """

    name: str
    data: Any
    ptr: Tensor
    edge_index: Tensor
    labels: int

    @classmethod
    def read(cls, name: str, path: Path, parts: int) -> Graph:
        """Read a folder or file; columns get mean 0 and deviation 1, and a graph without features singular vectors."""
        data = copy.copy(load("file", path=path).data)
        if data.x.size(1) <= 2:  # degrees
            data.x = spectral(data.edge_index, data.num_nodes)
        data.x, data.y = (data.x - data.x.mean(0)) / data.x.std(0).clamp(min=1e-6), data.y.float()
        data = to_adj_t(data)
        perm, ptr = partition(data.adj_t, parts, "metis", log=False)
        data = permute(data, perm, log=False)
        return cls(name, data, ptr, edge_index_of(data.adj_t), data.y.size(1))


def spectral(edge_index: Tensor, nodes: int) -> Tensor:
    """Singular vectors of the adjacency, divided by the roots of degrees [nodes, 64]: numbers from the edges alone."""
    degree = edge_index[0].bincount(minlength=nodes).clamp(min=1).float()
    values = (degree[edge_index[0]] * degree[edge_index[1]]).rsqrt()
    adjacency = torch.sparse_coo_tensor(edge_index.long(), values, (nodes, nodes)).coalesce()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vectors, _, _ = torch.svd_lowrank(adjacency, min(SPECTRAL, nodes - 1), niter=4)
    return vectors


def make_model(graph: Graph, course: Course, seed: int, **options: Any) -> RevGNN:
    torch.manual_seed(seed)
    sizes = graph.data.x.size(1), course.channels, graph.labels, course.layers
    return RevGNN(*sizes, dropout=course.dropout, task="multilabel", **options)


def label_losses(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of each label [m], a mean over the nodes."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0)


def steps(graph: Graph, course: Course, way: str, model: RevGNN, objective: str) -> Callable[[], Iterator[None]]:
    """Return what takes an epoch's gradients, and stops for the optimizer after each step."""
    data, weighting = graph.data, OBJECTIVES[objective]()
    mask, engine = data.train_mask, Engine(model)

    def backward(losses: Tensor) -> None:
        if objective == "mean":
            losses.mean().backward()
        else:
            engine.backward(losses, weighting)

    if way == WAYS[0]:

        def epoch() -> Iterator[None]:
            backward(label_losses(model(data.x, graph.edge_index)[mask], data.y[mask]))
            yield

    elif way == WAYS[1]:
        model(loader=EvalSubgraphLoader(data, graph.ptr, course.parts // 4, log=False))  # fills the histories, once
        model.train()
        loader = SubgraphLoader(data, graph.ptr, course.parts // 4, shuffle=True, log=False)

        def epoch() -> Iterator[None]:
            for batch in loader:
                rows = batch.data.train_mask[: batch.batch_size]
                logits = model(batch.data.x, batch.data.adj_t, *batch[1:])
                backward(label_losses(logits[rows], batch.data.y[: batch.batch_size][rows]))
                yield

    else:
        whole, number = WholeGraph(model, data, graph.ptr[::4]), int(mask.sum())

        def each(logits: Tensor, target: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(0) / number

        def epoch() -> Iterator[None]:
            if objective == "mean":
                whole.step(lambda logits, target: each(logits, target).mean())
            else:
                whole.step(each, weighting)
            yield

    return epoch


def measure(graph: Graph, course: Course, way: str, objective: str, seed: int) -> Row:
    """Train once.

    Returns:
        The row's settings; `test` and `val`, the mean average precision at the best epoch of validation, in percent;
        `peak_bytes` of a step; `seconds` of the processor for an epoch; `conflict`, the share of pairs of labels with
        opposed gradients after the last epoch, on the whole graph; and `least_cosine` of the update with one of them.
    """
    model = make_model(
        graph,
        course,
        seed,
        **({"num_nodes": graph.data.num_nodes} if way == WAYS[1] else {"disable": way == WAYS[0]}),
    )
    judge, data = make_model(graph, course, seed), graph.data
    epoch = steps(graph, course, way, model, objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=course.lr)
    spent, best, test, best_epoch = [], -1.0, 0.0, 0
    for number in range(course.epochs):
        model.train()
        start = time.process_time()
        for _ in epoch():
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        spent.append(time.process_time() - start)
        judge.load_state_dict(model.state_dict())
        judge.eval()
        with torch.no_grad():
            logits = judge(data.x, graph.edge_index)
        found = score(logits, data, "val")
        if found > best:
            best, test, best_epoch = found, score(logits, data, "test"), number + 1
    engine, mask = Engine(judge), data.train_mask
    gramian = engine.compute_gramian(
        label_losses(judge(data.x, graph.edge_index)[mask], data.y[mask]), retain_graph=False
    )
    seen = conflict(gramian, OBJECTIVES[objective]()(gramian))
    return {
        **{"graph": graph.name, "labels": graph.labels, "way": way, "objective": objective, "seed": seed},
        **asdict(course),
        **{"test": 100 * test, "val": 100 * best, "best_epoch": best_epoch},
        "seconds": statistics.fmean(spent[1:] or spent),
        "conflict": seen.negative_share,
        "least_cosine": seen.min_cosine,
        "peak_bytes": peak_bytes(lambda: next(epoch()), CPU),
    }


def same_run(row: Row, other: Row) -> bool:
    """Whether both are of the same settings, which numbers that are measured are not part of."""
    return all(row[key] == other[key] for key in ("graph", "way", "objective", "layers", "epochs", "seed"))


def read_rows(kept: Path) -> list[Row]:
    """Read a file with a row for each run."""
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def measure_all(
    graphs: Sequence[Graph], courses: Sequence[Course], seeds: Sequence[int], ways: Sequence[str], kept: Path
) -> list[Row]:
    """Measure what ``kept``, a file with a row for each run, does not have yet, and add each as soon as it is there."""
    rows = read_rows(kept)
    for graph in graphs:
        for course in courses:
            for seed in seeds:
                for way in ways:
                    for objective in OBJECTIVES:
                        wanted = {"graph": graph.name, "way": way, "objective": objective, "seed": seed}
                        if any(same_run(row, wanted | asdict(course)) for row in rows):
                            continue
                        rows.append(measure(graph, course, way, objective, seed))
                        with kept.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def gathered(rows: Sequence[Row]) -> list[Row]:
    """One row for all seeds: means, and the deviation of the test score."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("graph", "layers", "epochs", "way", "objective"))
        groups.setdefault(key, []).append(row)
    found = []
    for runs in groups.values():
        means = {
            name: statistics.fmean(run[name] for run in runs)
            for name in ("test", "val", "seconds", "conflict", "least_cosine", "peak_bytes")
        }
        deviation = statistics.stdev(run["test"] for run in runs) if len(runs) > 1 else None
        found.append({**runs[0], **means, "deviation": deviation, "seeds": len(runs)})
    return found


def accuracy_table(rows: Sequence[Row]) -> str:
    """Lay out what `gathered` returns."""
    head = ["graph", "layers", "training", "objective", "AP, %", "(dev.)", "peak, MiB", "s / epoch", "conflict, %"]
    body = [
        [
            row["graph"],
            str(row["layers"]),
            row["way"],
            row["objective"],
            f"{row['test']:.2f}",
            show(row["deviation"], ".2f"),
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['seconds']:.2f}",
            f"{100 * row['conflict']:.1f}",
            f"{row['seeds']} x {row['epochs']}",
        ]
        for row in rows
    ]
    return table([*head, "seeds x epochs"], body)
