import itertools
import logging

import numpy as np
import pytest
import torch
from graph_zoo import directed, edges_of, edges_of_adj_t, every_graph, graph, ring
from torch_geometric import EdgeIndex
from torch_geometric.data import Data

from recollect.autoscale import Partition, SubData, edge_index_of, permute, to_adj_t
from recollect.data import load

both_forms = pytest.mark.parametrize("form", [lambda data: data, to_adj_t], ids=["edge_index", "adj_t"])


def random_perm(data, seed=0):
    return torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))


@every_graph
def test_the_permuted_graph_is_the_same_graph(make):
    data = make()
    perm = random_perm(data)
    found = permute(data, perm)
    back = [(int(perm[source]), int(perm[target]), *rest) for source, target, *rest in edges_of(found)]
    assert sorted(back) == edges_of(data)
    for key in ("x", "y", "train_mask"):
        assert torch.equal(found[key], data[key][perm])
    assert torch.equal(found.node_order, perm)
    assert found.name == "zoo"


@every_graph
def test_edges_keep_their_order_in_edge_index(make):
    data = make()
    perm = random_perm(data)
    found = permute(data, perm)
    assert torch.equal(perm[found.edge_index], data.edge_index)
    assert found.edge_attr is data.edge_attr
    assert found.edge_weight is data.edge_weight


@every_graph
def test_adj_t_is_permuted_like_edge_index(make):
    data = make()
    perm = random_perm(data)
    one, other = to_adj_t(permute(data, perm)), permute(to_adj_t(data), perm)
    assert torch.equal(one.adj_t.to_dense(), other.adj_t.to_dense())
    assert torch.equal(one.edge_attr, other.edge_attr)
    assert edges_of_adj_t(other.adj_t, other.edge_attr) == edges_of(permute(data, perm))


@every_graph
def test_adj_t_holds_the_edges(make):
    data = make()
    found = to_adj_t(data)
    assert edges_of_adj_t(found.adj_t, found.edge_attr) == edges_of(data)
    assert "edge_index" not in found
    assert "edge_weight" not in found
    assert "edge_index" in data
    wanted = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.float64)
    for source, target, weight, _ in edges_of(data):
        wanted[target, source] += weight
    torch.testing.assert_close(found.adj_t.to_dense(), wanted)
    columns, rowptr = found.adj_t.col_indices(), found.adj_t.crow_indices().tolist()
    assert all((columns[a:b].diff() >= 0).all() for a, b in itertools.pairwise(rowptr))


@both_forms
def test_permuting_twice_is_permuting_once(form):
    data = form(directed())
    first, second = random_perm(data, 1), random_perm(data, 2)
    one, other = permute(permute(data, first), second), permute(data, first[second])
    assert torch.equal(one.node_order, other.node_order)
    assert torch.equal(one.x, other.x)
    assert torch.equal(to_adj_t(one).adj_t.to_dense(), to_adj_t(other).adj_t.to_dense())
    back = torch.empty_like(data.x)
    back[one.node_order] = one.x
    assert torch.equal(back, data.x)


@both_forms
def test_the_graph_is_not_changed(form):
    data = form(directed())
    before = data.clone()
    permute(data, random_perm(data))
    assert data.keys() == before.keys()
    for key in before.keys():  # noqa: SIM118 - Data is no mapping
        one, other = (graph[key].to_dense() if key == "adj_t" else graph[key] for graph in (data, before))
        assert one is other or one == other if isinstance(one, str) else torch.equal(one, other)


@both_forms
def test_tensors_of_nodes_get_the_new_numbers(form):
    data = ring()
    data.edge_label_index = torch.tensor([[0, 3], [5, 3]])
    data.edge_label = torch.tensor([1, 0])
    perm = random_perm(data)
    found = permute(form(data), perm)
    assert torch.equal(perm[found.edge_label_index], data.edge_label_index)
    assert found.edge_label is data.edge_label


def test_the_order_of_an_edge_index_is_not_claimed():
    data = ring()
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(8, 8)).sort_by("row").values
    found = permute(data, random_perm(data))
    assert type(found.edge_index) is torch.Tensor


def square():
    """As many edges as nodes."""
    return graph(6, [(i, (i + 1) % 6) for i in range(6)])


@both_forms
def test_names_decide_where_sizes_do_not(form):
    data = square()
    data.edge_kind, data.node_kind, data.old_mask = torch.arange(6), torch.arange(6), torch.arange(6) > 2
    perm = torch.tensor([3, 5, 0, 1, 4, 2])
    found = permute(form(data), perm)
    assert torch.equal(found.x, data.x[perm])
    assert torch.equal(found.node_kind, perm)
    assert torch.equal(found.old_mask, perm > 2)
    wanted = edges_of(permute(square(), perm))
    kind = {float(weight): k for k, weight in enumerate(data.edge_weight)}
    found = to_adj_t(found)
    order = [kind[float(weight)] for weight in found.adj_t.values()]
    assert found.edge_kind.tolist() == order
    assert edges_of_adj_t(found.adj_t, found.edge_attr) == wanted


@both_forms
def test_what_could_be_either_is_refused_until_it_is_said(form):
    data = form(square())
    data.charge = torch.arange(6)
    with pytest.raises(ValueError, match=r"of 6 nodes and 6 edges, .* kinds={'charge': 'node'}"):
        permute(data, torch.arange(6))
    perm = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.equal(permute(data, perm, kinds={"charge": "node"}).charge, perm)
    assert permute(data, perm, kinds={"charge": "graph"}).charge is data.charge
    assert torch.equal(perm[permute(data, perm, kinds={"charge": "index"}).charge], data.charge)


def with_attributes(**attributes):
    data = ring()
    for key, value in attributes.items():
        data[key] = value
    return data


@pytest.mark.parametrize("call", [to_adj_t, lambda data, **kinds: permute(data, torch.arange(8).flip(0), **kinds)])
def test_numbers_of_nodes_under_a_doubtful_name_are_refused_until_it_is_said(call):
    data = ring()
    data.train_idx = torch.tensor([1, 5])
    with pytest.raises(ValueError, match=r"data.train_idx has shape \(2,\) .* kinds={'train_idx': 'index'}, or"):
        call(data)
    assert call(data, kinds={"train_idx": "graph"}).train_idx.tolist() == [1, 5]
    assert call(data, kinds={"train_idx": "index"}).train_idx.tolist() == ([1, 5] if call is to_adj_t else [6, 2])
    data.train_idx = torch.arange(8) < 3  # a mask
    call(data)


@pytest.mark.parametrize("rows", [["a"] * 8, ("a",) * 16, np.zeros(8)], ids=["list", "tuple", "numpy"])
def test_rows_that_would_be_left_behind_are_refused(rows):
    data = with_attributes(titles=rows)
    with pytest.raises(TypeError, match=r"data.titles is a \w+ of \d+ entries, .* make it a tensor"):
        permute(data, torch.arange(8))
    assert permute(data, torch.arange(8), kinds={"titles": "graph"}).titles is rows


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (ring, {"perm": torch.arange(7)}, ValueError, r"shape \(7,\), but must be int64 .* the 8 nodes"),
        (ring, {"perm": torch.arange(8).int()}, ValueError, "perm has dtype torch.int32"),
        (ring, {"perm": torch.arange(8) + 1}, ValueError, "entries from 1 to 8, but nodes are 0 to N - 1"),
        (ring, {"perm": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])}, ValueError, "perm leaves out node 7"),
        (ring, {"kinds": {"z": "node"}}, ValueError, r"kinds\['z'\] is 'node', .* attributes of data; it has edge_"),
        (ring, {"kinds": {"x": "nodes"}}, ValueError, "must say one of node, edge, index, graph"),
        (ring, {"kinds": {"x": "edge"}}, ValueError, r"data.x has shape \(8, 3\), .* each of the 16 edges"),
        (lambda: with_attributes(train_mask=torch.ones(9)), {}, ValueError, "data.train_mask has shape"),
        (lambda: with_attributes(edge_weight=torch.tensor(2.0)), {}, ValueError, r"data.edge_weight has shape \(\)"),
        (lambda: with_attributes(x=torch.eye(8).to_sparse()), {}, TypeError, "layout torch.sparse_coo, but must be d"),
        (lambda: with_attributes(edge_index=None), {}, ValueError, "neither of edge_index and adj_t"),
        (lambda: with_attributes(edge_index=None, adj_t=torch.eye(8)), {}, TypeError, "layout torch.strided"),
    ],
)
def test_refused(data, arguments, error, message):
    with pytest.raises(error, match=message):
        permute(data(), **{"perm": torch.arange(8), **arguments})


@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, torch.arange(8))], ids=["to_adj_t", "permute"])
def test_edges_that_are_no_numbers_of_nodes_are_refused(call):
    data = ring()
    data.edge_index = data.edge_index.float()
    with pytest.raises(TypeError, match=r"edge_index is of torch.float32, but must hold nodes by number"):
        call(data)


def test_weights_that_are_no_numbers_are_refused():
    data = ring()
    data.edge_weight = data.edge_weight.unsqueeze(1)
    with pytest.raises(ValueError, match=r"edge_weight has shape \(16, 1\), but must be \[E\]"):
        to_adj_t(data)


def test_edges_in_int32_of_more_nodes_than_its_root():
    """Products of two numbers of nodes are beyond int32 from 46,341 nodes on."""
    edge_index = torch.randint(50_000, (2, 200), generator=torch.Generator().manual_seed(0))
    one, other = (to_adj_t(Data(edge_index=edges, num_nodes=50_000)).adj_t for edges in (edge_index, edge_index.int()))
    assert torch.equal(edge_index_of(one), edge_index_of(other))
    pairs = sorted(zip(*edge_index.flip(0).tolist(), strict=True))
    assert list(zip(*edge_index_of(other).flip(0).tolist(), strict=True)) == pairs


@pytest.mark.parametrize(("node", "message"), [(8, "entries from 0 to 8, but the graph's 8 nodes"), (-1, "from -1 to")])
@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, torch.arange(8))], ids=["to_adj_t", "permute"])
def test_edges_of_no_node_are_refused(call, node, message):
    data = ring()
    data.edge_index[1, 3] = node
    with pytest.raises(ValueError, match=message):
        call(data)


def test_time_is_logged_if_wanted(caplog):
    with caplog.at_level(logging.INFO, logger="recollect"):
        permute(ring(), torch.arange(8), log=False)
        assert caplog.messages == []
        permute(ring(), torch.arange(8))
    assert "permuted 8 nodes" in caplog.messages[0]


@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, torch.arange(8))], ids=["to_adj_t", "permute"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load("karate"), "data is a GraphDataset, but must be a graph, .*; give its attribute data"),
        (lambda: SubData(ring(), 8, *3 * [torch.arange(8)]), "data is a SubData, .*; give its attribute data"),
        (lambda: ring().edge_index, "data is a tensor of layout torch.strided, but .* makes one of tensors"),
    ],
)
def test_what_is_no_graph_is_refused(call, make, message):
    with pytest.raises(TypeError, match=message):
        call(make())


@pytest.mark.parametrize("perm", [Partition(torch.arange(8), torch.tensor([0, 8])), list(range(8))])
def test_a_permutation_is_a_tensor(perm):
    with pytest.raises(TypeError, match=r"perm is a (Partition|list), but must be an int64 tensor \[N\], the first of"):
        permute(ring(), perm)
