"""What the graph benchmark measures of loaders and partitions, at sizes that say nothing of speed."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("torch_geometric.data")  # also hides what it warns of when it is imported

from bench import _graph_loader as loader
from bench import _graph_partition as partition

from recollect.autoscale import SubgraphLoader

CPU = torch.device("cpu")


@pytest.mark.parametrize("work", loader.QUICK, ids=lambda work: work.name)
def test_sorting_cuts_the_same_mini_batches(work: loader.Loaded) -> None:
    data, ptr = loader.make_graph(work, CPU)
    chosen = loader.mini_batches(work, 3)
    batches = SubgraphLoader(data, ptr, batch_sampler=chosen)
    sorting = loader.Sorting(batches.data.adj_t, ptr)
    for parts, batch in zip(chosen, batches, strict=True):
        adj_t, n_id, batch_size = sorting(parts)
        assert batch_size == batch.batch_size
        assert torch.equal(n_id, batch.n_id)
        for rows in (torch.Tensor.crow_indices, torch.Tensor.col_indices, torch.Tensor.values):
            assert torch.equal(rows(adj_t), rows(batch.data.adj_t))


def test_graphs_are_as_local_as_they_say() -> None:
    work = loader.Loaded("", nodes=1_003, edges=40_000, parts=10, parts_at_once=1, local=0.7)
    data, ptr = loader.make_graph(work, CPU)
    assert ptr.tolist() == [*range(0, 1_000, 100), 1_003]
    source, target = torch.bucketize(data.edge_index, ptr[1:], right=True)
    assert data.edge_index.max() < work.nodes
    assert float((source == target).double().mean()) == pytest.approx(0.7 + 0.3 * 0.1, abs=0.02)


def test_figures_of_the_loader() -> None:
    work = loader.QUICK[0]
    figures = loader.loader_figures(work, repeats=2, number=3)
    assert figures["edges"] == pytest.approx(work.edges * work.parts_at_once / work.parts, rel=0.1)
    assert 0 < figures["halo"] < work.nodes
    for name in (loader.RECOLLECT, loader.SORTING):
        milliseconds, speed = figures["milliseconds"][name], figures["edges_per_second"][name]
        assert milliseconds * speed / 1e3 == pytest.approx(figures["edges"])
    (target,) = loader.loader_targets(work, figures)
    assert target.reached is None
    for speed, reached in ((12.7e6, True), (12.5e6, False)):
        (target,) = loader.loader_targets(loader.LOADED[0], {"edges_per_second": {loader.RECOLLECT: speed}})
        assert target.reached is reached


def test_figures_of_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kaminpar")
    monkeypatch.setitem(sys.modules, "pymetis", None)
    work = partition.QUICK
    methods = partition.partition_figures(work)["methods"]
    assert methods["planted"]["cut_share"] == pytest.approx(1 - work.homophily)
    assert methods["planted"]["balance"] == 1
    assert methods["kaminpar"]["cut_share"] == pytest.approx(0.2, abs=0.02)  # the blocks are easy to find
    assert methods["random"]["cut_share"] == pytest.approx(0.9, abs=0.02)
    assert methods["kaminpar"]["seconds"] > 0
    assert "pip install pymetis" in methods["metis"]["skipped"]
