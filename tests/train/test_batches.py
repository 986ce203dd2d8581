from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recollect.train._batches import FullBatch, PartBatches, evaluation_loader
from recollect.train._config import parse
from recollect.train.families import family_of

CPU = torch.device("cpu")
SETTINGS = parse(["model=gcn", "training=autoscale", "training.num_parts=4", "training.parts_per_batch=2"])


@pytest.fixture
def graph(graph_maker):
    return family_of(SETTINGS).prepare(graph_maker("multiclass", "accuracy", 3))


def test_the_whole_graph_is_one_step(graph):
    (batch,) = FullBatch(graph, (graph.data.x, graph.data.adj_t))
    assert batch.inputs[0] is graph.data.x
    assert batch.inputs[1] is graph.data.adj_t
    assert batch.target is graph.data.y
    assert torch.equal(batch.rows, graph.data.train_mask.nonzero().flatten())


def test_an_epoch_has_every_training_node_once_with_its_own_row(graph):
    seen = []
    for inputs, target, rows in PartBatches(graph, SETTINGS.training, CPU):
        x, adj_t, size, n_id, offset, count = inputs
        assert torch.equal(x, graph.data.x[n_id])
        assert torch.equal(adj_t.to_dense(), graph.data.adj_t.to_dense()[n_id[:size]][:, n_id])
        assert torch.equal(target, graph.data.y[n_id[:size]])
        assert torch.equal(rows, graph.data.train_mask[n_id[:size]].nonzero().flatten())
        assert (offset.numel(), int(count.sum())) == (2, size)
        seen += n_id[:size][rows].tolist()
    assert sorted(seen) == graph.data.train_mask.nonzero().flatten().tolist()


def test_mini_batches_without_a_training_node_are_left_out(graph):
    first = slice(int(graph.ptr[0]), int(graph.ptr[1]))
    graph.data.train_mask[:] = False
    graph.data.train_mask[first] = True
    assert len(list(PartBatches(graph, SETTINGS.training, CPU))) == 1


def test_parts_are_drawn_anew_in_each_epoch_by_torchs_generator(graph):
    def epochs(seed):
        torch.manual_seed(seed)
        batches = PartBatches(graph, SETTINGS.training, CPU)
        return [[batch.inputs[4].tolist() for batch in batches] for _ in range(8)]

    first = epochs(0)
    assert first == epochs(0)
    assert len({str(epoch) for epoch in first}) > 1


@pytest.mark.parametrize("whole", [True, False])
def test_edges_are_left_out_of_a_step_and_stay_in_the_graph(graph, whole):
    settings = replace(SETTINGS.training, edge_dropout=0.5)
    before = graph.data.adj_t.values().clone()
    torch.manual_seed(0)
    inputs = (graph.data.x, graph.data.adj_t)
    batches = FullBatch(graph, inputs, 0.5) if whole else PartBatches(graph, settings, CPU)
    values = torch.cat([batch.inputs[1].values() for batch in batches])
    assert 0 < int((values == 0).sum()) < values.numel()
    assert torch.equal(graph.data.adj_t.values(), before)


def test_evaluation_has_every_node_in_order(graph):
    nodes = torch.cat([sub.n_id[: sub.batch_size] for sub in evaluation_loader(graph, SETTINGS.training)])
    assert nodes.tolist() == list(range(12))


def test_a_graph_that_is_not_cut_is_refused(graph_maker):
    whole = family_of(parse(["model=gcn"])).prepare(graph_maker("multiclass", "accuracy", 3))
    with pytest.raises(ValueError, match="not cut into parts"):
        PartBatches(whole, SETTINGS.training, CPU)
