"""The edges from a mini-batch to nodes outside, against a walk over all edges."""

import itertools
import pickle

import pytest
import torch
from graph_zoo import every_graph, ptr_of, scattered
from torch_geometric.data import Data

from recollect.autoscale import SubgraphLoader, permute, to_adj_t
from recollect.messages import rows_of


def cut(data, parts, outward):
    num_nodes = data.num_nodes
    sizes = [num_nodes // 3, 0, num_nodes - num_nodes // 3 - 1, 1]
    loader = SubgraphLoader(data, ptr_of(*sizes), len(parts), log=False, outward=outward, sampler=parts)
    return next(iter(loader))


def edges_of(data):
    """(source, target, weight, attributes) of each edge."""
    adj_t = data.adj_t
    columns = (adj_t.col_indices(), rows_of(adj_t), adj_t.values())
    return list(zip(*(column.tolist() for column in columns), map(tuple, data.edge_attr.tolist()), strict=True))


def found_edges(outward):
    """The same of outward edges, which are by target."""
    rows = rows_of(outward.adj_t())
    columns = (outward.n_id[outward.col], outward.n_id[rows], outward.value)
    attributes = map(tuple, outward.edges["edge_attr"].tolist())
    return sorted(zip(*(column.tolist() for column in columns), attributes, strict=True))


@every_graph
@pytest.mark.parametrize("parts", [*itertools.combinations(range(4), 1), *itertools.combinations(range(4), 2)])
def test_outward_edges_are_those_that_leave_the_batch(make, parts):
    data = to_adj_t(permute(make(), torch.arange(make().num_nodes), log=False))
    batch = cut(data, parts, True)
    inside = set(batch.n_id[: batch.batch_size].tolist())
    leaving = [edge for edge in edges_of(data) if edge[0] in inside and edge[1] not in inside]
    outward = batch.data.outward
    targets = outward.num_targets
    assert outward.n_id[:targets].tolist() == sorted({edge[1] for edge in leaving})
    assert torch.equal(outward.n_id[targets:], batch.n_id[: batch.batch_size])
    assert torch.equal(outward.nodes["x"], data.x[outward.n_id])
    by_target = outward.by_target()
    assert found_edges(by_target) == sorted(leaving)
    dense = by_target.adj_t().to_dense()
    assert not dense[:, :targets].any()
    torch.testing.assert_close(outward.adj().to_dense(), dense[:, targets:].t())


@every_graph
def test_complete_are_all_edges_into_the_nodes_outside(make):
    data = to_adj_t(permute(make(), torch.arange(make().num_nodes), log=False))
    for parts in itertools.combinations(range(4), 2):
        batch = cut(data, parts, "complete")
        inside = set(batch.n_id[: batch.batch_size].tolist())
        edges = edges_of(data)
        targets = {edge[1] for edge in edges if edge[0] in inside and edge[1] not in inside}
        outward = batch.data.outward
        assert set(outward.n_id[: outward.num_targets].tolist()) == targets
        assert found_edges(outward.by_target()) == sorted(edge for edge in edges if edge[1] in targets)
        assert outward.n_id.unique().numel() == outward.n_id.numel()


@every_graph
def test_induced_are_the_edges_among_the_batch_and_its_neighbours(make):
    data = to_adj_t(permute(make(), torch.arange(make().num_nodes), log=False))
    for parts in itertools.combinations(range(4), 2):
        batch = cut(data, parts, "induced")
        inside = set(batch.n_id[: batch.batch_size].tolist())
        edges = edges_of(data)
        targets = sorted({edge[1] for edge in edges if edge[0] in inside and edge[1] not in inside})
        near = {*batch.n_id.tolist(), *targets}
        outward = batch.data.outward
        assert outward.n_id[: outward.num_targets].tolist() == targets
        assert found_edges(outward) == sorted(edge for edge in edges if edge[1] in targets and edge[0] in near)
        for k, node in enumerate(targets):
            into = [edge[0] in near for edge in edges if edge[1] == node]
            out = [edge[1] in inside or edge[1] in targets for edge in edges if edge[0] == node]
            for found, expected in zip(outward.share[:, k].tolist(), (into, out), strict=True):
                assert found == (sum(expected) / len(expected) if expected else 1.0)
        crossing = cut(data, parts, True).data.outward
        assert found_edges(outward.from_batch(batch.batch_size)) == found_edges(crossing.by_target())
        assert torch.equal(outward.from_batch(batch.batch_size).n_id, crossing.n_id)
        assert torch.equal(cut(data, parts, "complete").data.outward.share, outward.share)
        assert torch.equal(outward.weights, crossing.weights)


def test_outward_edges_move_and_travel_with_the_batch():
    data = to_adj_t(permute(scattered(), torch.arange(40), log=False))
    outward = cut(data, [0], True).data.outward
    moved = cut(data, [0], True).to("meta").data.outward
    assert {moved.col.device.type, moved.value.device.type, moved.nodes["x"].device.type} == {"meta"}
    assert torch.equal(moved.n_id, outward.n_id)  # by which histories are addressed, from the host
    assert moved.num_targets == outward.num_targets
    copied = pickle.loads(pickle.dumps(cut(data, [0], True))).data.outward
    assert torch.equal(copied.value, outward.value)
    assert type(copied) is type(outward)


@pytest.mark.parametrize("edges", [4, 200], ids=["few", "many"])
def test_rows_that_have_edges_to_the_outside_are_told_if_they_are_few(edges):
    generator = torch.Generator().manual_seed(0)
    data = Data(x=torch.zeros(40, 2), edge_index=torch.randint(40, (2, edges), generator=generator))
    data = to_adj_t(permute(data, torch.arange(40), log=False))
    for parts in ([0], [1, 2]):
        batch = cut(data, parts, True)
        outward = batch.data.outward
        rows = outward.rowptr.diff().nonzero().squeeze(1)
        if 2 * len(rows) < batch.batch_size:
            assert torch.equal(outward.near, rows)
        else:
            assert outward.near is None
        assert cut(data, parts, "complete").data.outward.near is None
