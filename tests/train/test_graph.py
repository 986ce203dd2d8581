from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recollect.train._config import parse
from recollect.train._errors import TrainingError, UsageError
from recollect.train.families import family_of

PARTS = ["model=gcn", "training=autoscale", "training.num_parts=3", "training.parts_per_batch=1"]


def prepare(settings, graph):
    return family_of(settings).prepare(graph)


@pytest.fixture
def graph(graph_maker):
    made = graph_maker("multiclass", "accuracy", 3, edge_attr=True)
    made.data.x = made.data.x.abs()
    made.data.x[4] = 0.0
    made.data.x[5] = 0.01
    return made


def dense(graph):
    a = torch.zeros(12, 12, dtype=torch.float64)
    source, target = graph.data.edge_index
    a[target, source] = 1.0
    return a


def expected(graph, how):
    a = dense(graph)
    if how == "plain":
        return a
    a = a + torch.eye(12, dtype=torch.float64)
    degree = a.sum(1)
    return a if how == "loops" else a / (degree[:, None] * degree[None, :]).sqrt()


def test_a_reversible_model_gets_the_graph_as_it_is(graph):
    prepared = prepare(parse([]), graph)
    assert prepared.data.x is graph.data.x
    assert prepared.data.edge_index is graph.data.edge_index
    assert prepared.data.edge_attr is graph.data.edge_attr
    assert (prepared.name, prepared.num_edges, prepared.ptr) == (graph.name, 24, None)


@pytest.mark.parametrize("how", ["plain", "loops", "symmetric"])
@pytest.mark.parametrize("overrides", [["model=gcn"], PARTS], ids=["whole", "parts"])
def test_the_adjacency_is_what_the_model_wants_in_the_order_of_the_parts(graph, how, overrides):
    prepared = prepare(parse([*overrides, f"model.adjacency={how}"]), graph)
    order = prepared.data.node_order if prepared.ptr is not None else torch.arange(12)
    found = prepared.data.adj_t.to_dense().double()
    assert torch.allclose(found, expected(graph, how)[order][:, order], atol=1e-7)
    for name in ("x", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(prepared.data[name], graph.data[name][order])
    assert prepared.num_edges == 24  # not those that the model adds
    assert "adj_t" not in graph.data  # the loaded graph is left alone


def test_parts_are_as_many_as_asked_and_have_every_node(graph):
    prepared = prepare(parse([*PARTS, "training.num_parts=5"]), graph)
    assert prepared.ptr.tolist()[0] == 0
    assert prepared.ptr.tolist()[-1] == 12
    assert prepared.ptr.numel() == 6


def test_parts_are_kept_in_a_folder(graph, tmp_path):
    settings = parse([*PARTS, f"training.partition_cache={tmp_path / 'parts'}"])
    first, again = prepare(settings, graph), prepare(settings, graph)
    assert list((tmp_path / "parts").iterdir())
    assert torch.equal(first.data.node_order, again.data.node_order)


def test_a_folder_of_parts_that_is_none_is_named(graph, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=rf"training.partition_cache={tmp_path / 'file'} cannot be used: .*exists"):
        prepare(parse([*PARTS, f"training.partition_cache={tmp_path / 'file'}"]), graph)


def test_features_of_a_node_sum_to_one_but_those_that_sum_to_less(graph):
    x = prepare(parse(["data.features=rows"]), graph).data.x
    for row, before in zip(x.tolist(), graph.data.x.tolist(), strict=True):
        total = sum(before)
        assert row == pytest.approx([value / total for value in before] if total > 1 else before)


def test_features_of_a_column_have_mean_zero_and_deviation_one(graph):
    graph.data.x[:, 2] = 7.0
    x = prepare(parse(["data.features=columns"]), graph).data.x.double()
    assert x.mean(0).tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    assert x.std(0).tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0, 1.0], abs=1e-5)  # column 2 is constant


def test_more_parts_than_nodes_are_refused(graph):
    with pytest.raises(UsageError, match=r"num_parts=13: the graph has only 12 nodes.*write training.num_parts=4, or"):
        prepare(parse([*PARTS, "training.num_parts=13"]), graph)


def test_a_missing_partitioner_names_another(graph, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pymetis", None)
    with pytest.raises(TrainingError, match=r"pymetis.*training.partition=random"):
        prepare(parse(PARTS), graph)
    settings = parse([*PARTS, "training.partition=random"])
    assert prepare(settings, replace(graph, name="other")).ptr.numel() == 4
