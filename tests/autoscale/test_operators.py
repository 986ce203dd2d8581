"""Normalisation, self-loops and the forms of an adjacency."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graph_zoo import every_graph, ring
from torch_geometric import EdgeIndex
from torch_geometric.data import Data
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from recollect.autoscale import add_self_loops, edge_index_of, normalize, partition, to_adj_t, with_weights
from recollect.autoscale._adjacency import adjacency_of, as_csr, first_rows


def ascending(adj_t):
    rows = adj_t.crow_indices().tolist()
    return all((adj_t.col_indices()[a:b].diff() >= 0).all() for a, b in pairwise(rows))


@every_graph
def test_normalisation_is_torch_geometrics(make):
    data = make()
    found = normalize(to_adj_t(data).adj_t)
    edge_index, weight = gcn_norm(data.edge_index, data.edge_weight, data.num_nodes)
    expected = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.float64)
    expected.index_put_((edge_index[1], edge_index[0]), weight, accumulate=True)
    torch.testing.assert_close(dense(found), expected)
    assert ascending(found)


def dense(adj_t):
    """Sum of repeated edges, which torch's own conversion may overwrite."""
    source, target = edge_index_of(adj_t)
    out = torch.zeros(adj_t.shape, dtype=adj_t.dtype)
    return out.index_put_((target, source), adj_t.values(), accumulate=True)


@every_graph
def test_self_loops_are_added_where_there_are_none(make):
    adj_t = to_adj_t(make()).adj_t
    found = add_self_loops(adj_t, 2.0)
    before = dense(adj_t)
    has = before.diagonal() != 0
    assert torch.equal(dense(found), before + torch.diag(torch.where(has, 0.0, 2.0).double()))
    assert found.values().numel() == adj_t.values().numel() + int((~has).sum())
    assert ascending(found)


def test_normalisation_without_self_loops_and_with_nodes_without_edges():
    adj_t = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).to_sparse_csr()
    found = normalize(adj_t, self_loops=False)
    assert torch.equal(found.to_dense(), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_degrees_that_the_type_of_the_weights_cannot_hold(dtype):
    """4,096 edges into one node: sums of ones end at 2,048 in float16, and at 256 in bfloat16."""
    edges = torch.stack([torch.arange(4097), torch.zeros(4097, dtype=torch.int64)])
    exact = to_adj_t(Data(num_nodes=4097, edge_index=edges, edge_weight=torch.ones(4097, dtype=torch.float64))).adj_t
    found = normalize(with_weights(exact, exact.values().to(dtype))).values()
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(found.double(), normalize(exact).values(), rtol=torch.finfo(found.dtype).eps, atol=0)


@pytest.mark.parametrize("function", [normalize, add_self_loops])
def test_only_a_whole_graph_can_be_changed(function):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        function(torch.ones(2, 3).to_sparse_csr())
    with pytest.raises(TypeError, match=r"torch\.strided"):
        function(torch.ones(3, 3))


def test_edges_and_other_weights():
    data = to_adj_t(ring())
    source, target = edge_index_of(data.adj_t)
    assert torch.equal(torch.stack([target, source]), data.adj_t.to_sparse_coo().indices())
    assert torch.equal(dense(with_weights(data.adj_t, data.adj_t.values() * 2)), dense(data.adj_t) * 2)


def test_first_rows():
    whole = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]).to_sparse_csr()
    assert first_rows(whole, 3) is whole
    assert torch.equal(first_rows(whole, 1).to_dense(), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(first_rows(whole, 2).to_dense(), whole.to_dense()[:2])


class TestEdgeIndex:
    def test_it_is_another_form_of_the_same(self):
        data = ring()
        expected = to_adj_t(data)
        edges = EdgeIndex(edge_index_of(expected.adj_t), sparse_size=(8, 8), sort_order="col")
        found = as_csr(edges, expected.adj_t.values())
        assert torch.equal(found.to_dense(), expected.adj_t.to_dense())
        assert torch.equal(as_csr(edges).to_dense(), (expected.adj_t.to_dense() != 0).float())
        data.edge_index = edges
        data.edge_weight = expected.adj_t.values()
        assert torch.equal(adjacency_of(data).to_dense(), adjacency_of(expected).to_dense())

    def test_indices_are_of_one_type(self):
        edges = EdgeIndex(edge_index_of(to_adj_t(ring()).adj_t).int(), sparse_size=(8, 8), sort_order="col")
        found = as_csr(edges)
        assert found.crow_indices().dtype == found.col_indices().dtype == torch.int64

    @pytest.mark.parametrize(
        "options", [{}, {"sparse_size": (8, 8)}, {"sort_order": "col"}, {"sparse_size": (8, 8), "sort_order": "row"}]
    )
    def test_one_that_is_not_sorted_by_target_or_of_unknown_size(self, options):
        edges = ring().edge_index
        edges = edges[:, edges[0 if options.get("sort_order") == "row" else 1].argsort(stable=True)]
        with pytest.raises(ValueError, match="it must know its size, and be sorted by column"):
            as_csr(EdgeIndex(edges, **options))

    def test_a_plain_tensor_of_edges(self):
        with pytest.raises(TypeError, match=r"a tensor of layout torch\.strided"):
            as_csr(ring().edge_index)
        with pytest.raises(TypeError, match="adj_t is a str"):
            as_csr("edges")

    def test_weights_beside_a_sparse_tensor(self):
        with pytest.raises(ValueError, match="are its values"):
            as_csr(to_adj_t(ring()).adj_t, torch.ones(16))


@pytest.mark.parametrize("given", [lambda: ring().edge_index, ring], ids=["edge_index", "data"])
@pytest.mark.parametrize(
    "call",
    [
        add_self_loops,
        normalize,
        edge_index_of,
        lambda adj_t: with_weights(adj_t, torch.ones(16)),
        lambda adj_t: partition(adj_t, 2, "random"),
    ],
    ids=["add_self_loops", "normalize", "edge_index_of", "with_weights", "partition"],
)
def test_what_is_no_adjacency_is_refused(call, given):
    with pytest.raises(TypeError, match=r"adj_t is a (tensor of layout torch.strided|Data), .* to_adj_t\(data\).adj_t"):
        call(given())
