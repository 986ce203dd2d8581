"""Networks in the forms of public collections: one backward pass does each, and their numbers are there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    from bench import _objectives_collections as collections

from bench import objectives
from bench._harness import settings
from bench._step import relative_error

from recollect.autogram import Engine

CPU = torch.device("cpu")
MAKERS = collections.collection(3, 64, 1, CPU)


@pytest.mark.parametrize("name", MAKERS)
def test_one_pass_does_it_and_the_gramian_is_that_of_the_jacobian(name: str) -> None:
    torch.manual_seed(0)
    work = MAKERS[name]()
    assert (work.kind, work.size) == (name, "1 x 64, B = 3")
    model = work.model.double()
    torch.manual_seed(1)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    engine = Engine(model)
    losses = model(x).square().sum(1)
    assert engine.explain(losses).splitlines()[0].startswith("1 backward pass of 3 losses")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert relative_error([engine.compute_gramian(losses)], [jacobian @ jacobian.T]) < 1e-10


def test_numbers_of_all_of_them() -> None:
    options = objectives._parse(["--quick", "--works", "collections", "--repeats", "2"])
    with settings(threads=None):
        rows = objectives.run_collections(options, CPU)
    assert [row["kind"] for row in rows] == list(MAKERS)
    for row in rows:
        assert all(len(times) == 2 for times in row["all_seconds"].values())
        assert row["seconds"].keys() == row["peak_bytes"].keys() == {"plain", "freed"}
        assert row["ratio"] == row["seconds"]["freed"] / row["seconds"]["plain"]
    assert [target.reached for target in collections.collection_targets(rows)] == [None, None]
    options.works = ["mlp"]
    assert objectives.run_collections(options, CPU) == []


def row_of(ratio: float) -> dict[str, Any]:
    return {"size": collections.SIZE, "ratio": ratio}


@pytest.mark.parametrize(
    ("ratios", "reached"),
    [
        ([1.3] * 10, [True, True]),
        ([1.5] * 10, [True, False]),
        ([1.2] * 9 + [3.1], [False, True]),
        ([1.2] * 9, [None, None]),
    ],
)
def test_targets_are_of_the_slowest_and_of_the_middle(ratios: list[float], reached: list[bool | None]) -> None:
    assert [target.reached for target in collections.collection_targets(list(map(row_of, ratios)))] == reached
    options = objectives._parse([])
    size = options.collection_batch, options.collection_width, options.collection_layers
    assert "{2} x {1}, B = {0}".format(*size) == collections.SIZE
    assert len(MAKERS) == collections.COUNT
