"""Test scores of training with corrected histories, beside plain ones, the whole graph, and parts alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._graph_corrected import Course, loss_of, train
from bench._report import show, table
from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader
from recollect.messages import rows_of, sparse_csr
from recollect.models import GCN

Row = dict[str, Any]
REFRESH = 5  # epochs


def score(out: Tensor, data: Any, part: str) -> float:
    """Accuracy, or for several labels the mean of their average precisions."""
    mask = data[f"{part}_mask"]
    out, y = out[mask], data.y[mask]
    if y.dim() == 1:
        return float((out.argmax(-1) == y).double().mean())
    found = []
    for values, true in zip(out.t(), y.t(), strict=True):
        hits = true[values.argsort(descending=True)]
        if hits.any():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            found.append(float((precision * hits).sum() / hits.sum()))
    return statistics.fmean(found)


def whole(course: Course, data: Any, ptr: Tensor, seed: int) -> Iterator[GCN]:
    """As many steps as with mini-batches, each on the whole graph."""
    model = course.model(data, seed, keep_histories=False)
    before, after = course.steps(model)
    for _ in range(course.epochs):
        model.train()
        for _ in range(course.parts // course.parts_in_batch):
            before()
            loss_of(model(data.x, data.adj_t), data, int(data.train_mask.sum())).backward()
            after()
        yield model


def alone(course: Course, data: Any, ptr: Tensor, seed: int) -> Iterator[GCN]:
    """Mini-batches without the edges between them and the others."""
    model = course.model(data, seed, keep_histories=False)
    before, after = course.steps(model)
    generator = torch.Generator().manual_seed(seed)
    loader = SubgraphLoader(data, ptr, course.parts_in_batch, log=False, shuffle=True, generator=generator)
    for _ in range(course.epochs):
        model.train()
        for batch in loader:
            before()
            size, adj_t = batch.batch_size, batch.data.adj_t
            inside = adj_t.col_indices() < size
            rowptr = torch.zeros(size + 1, dtype=torch.int64)
            torch.cumsum(rows_of(adj_t)[inside].bincount(minlength=size), 0, out=rowptr[1:])
            adj_t = sparse_csr(rowptr, adj_t.col_indices()[inside], adj_t.values()[inside], (size, size))
            loss_of(model(batch.data.x[:size], adj_t), batch.data, int(data.train_mask.sum())).backward()
            after()
        yield model


def with_histories(course: Course, data: Any, ptr: Tensor, seed: int, **options: Any) -> Iterator[GCN]:
    for epoch, model in train(course, data, ptr, seed, **options):
        if epoch:
            yield model


def refreshed(course: Course, data: Any, ptr: Tensor, seed: int) -> Iterator[GCN]:
    """Corrected, and made exact every few epochs."""
    everything = EvalSubgraphLoader(data, ptr, course.parts_in_batch, log=False)
    total = int(data.train_mask.sum())
    for epoch, model in train(course, data, ptr, seed, compensate=True):
        if epoch % REFRESH == 0:
            model.refresh(everything, lambda out, batch: loss_of(out, batch.data, total))
        if epoch:
            yield model


MODES: dict[str, Callable[[Course, Any, Tensor, int], Iterator[GCN]]] = {
    "whole graph": whole,
    "parts alone": alone,
    "histories": with_histories,
    "corrected": lambda *arguments: with_histories(*arguments, compensate=True),
    f"corrected, refreshed every {REFRESH}": refreshed,
}


def measure_scores(course: Course, root: Path | None, runs: int) -> Row:
    """Score each mode on the test nodes at the epoch that is best on the validation nodes.

    Returns:
        `course`; `test`, percent by mode and seed; `mean` and `std` by mode.
    """
    data, ptr = course.permuted(root)
    row: Row = {"course": asdict(course), "test": {}, "mean": {}, "std": {}}
    for mode, begin in MODES.items():
        found = []
        for seed in range(runs):
            best = (-1.0, -1.0)
            for model in begin(course, data, ptr, seed):
                model.eval()
                with torch.no_grad():  # without filling the histories
                    out = model.run_layers(data.x, data.adj_t, {}, lambda layer, rows: rows)
                best = max(best, (score(out, data, "val"), score(out, data, "test")))
            found.append(100 * best[1])
        row["test"][mode], row["mean"][mode] = found, statistics.fmean(found)
        row["std"][mode] = statistics.stdev(found) if runs > 1 else None
    return row


def scores_table(courses: Sequence[Course], rows: Sequence[Row]) -> str:
    body = [
        [str(course), *(f"{row['mean'][mode]:.1f} ({show(row['std'][mode], '.1f')})" for mode in MODES)]
        for course, row in zip(courses, rows, strict=True)
    ]
    return table(["test, %", *MODES], body)
