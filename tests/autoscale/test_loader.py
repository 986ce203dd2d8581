import pytest
import torch
from graph_zoo import edges_of, edges_of_adj_t, every_graph, ptr_of, ring
from torch_geometric.utils import k_hop_subgraph

from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, permute, to_adj_t


def permuted(data, seed=0):
    return permute(data, torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed)))


def thirds(data):
    n = data.num_nodes
    return ptr_of(n // 3, n // 2 - n // 3, n - n // 2)


@every_graph
@pytest.mark.parametrize("parts", [(0,), (1,), (2, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("bipartite", [True, False])
def test_a_mini_batch_is_what_sets_and_loops_make_of_it(make, parts, bipartite):
    data = permuted(make())
    ptr = thirds(data)
    loader = SubgraphLoader(data, ptr, batch_size=len(parts), bipartite=bipartite, sampler=parts)
    (batch,) = loader
    inside = [node for part in parts for node in range(ptr[part], ptr[part + 1])]
    edges = [edge for edge in edges_of(data) if edge[1] in inside]
    halo = sorted({source for source, *_ in edges} - set(inside))
    assert batch.n_id.tolist() == inside + halo
    assert batch.batch_size == len(inside)
    assert batch.offset.tolist() == [ptr[part] for part in parts]
    assert batch.count.tolist() == [ptr[part + 1] - ptr[part] for part in parts]
    assert batch.data.adj_t.shape == (len(inside) if bipartite else len(inside + halo), len(inside + halo))
    found = edges_of_adj_t(batch.data.adj_t, batch.data.edge_attr)
    assert sorted((inside + halo)[s] * 100 + (inside + halo)[t] for s, t, *_ in found) == sorted(
        s * 100 + t for s, t, *_ in edges
    )
    assert sorted(((inside + halo)[s], (inside + halo)[t], *rest) for s, t, *rest in found) == edges
    for key in ("x", "y", "train_mask"):
        torch.testing.assert_close(batch.data[key], data[key][batch.n_id], rtol=0, atol=0)
    assert batch.data.name == "zoo"
    assert batch.data.num_nodes == len(inside + halo)
    assert "node_order" not in batch.data


@every_graph
def test_nodes_are_those_of_k_hop_subgraph(make):
    data = permuted(make())
    for batch in SubgraphLoader(data, thirds(data)):
        nodes, *_ = k_hop_subgraph(batch.n_id[: batch.batch_size], 1, data.edge_index, num_nodes=data.num_nodes)
        assert sorted(batch.n_id.tolist()) == nodes.tolist()


def test_evaluation_covers_every_node_once_in_order():
    data = permuted(ring())
    loader = EvalSubgraphLoader(data, ptr_of(1, 0, 3, 2, 2), batch_size=2)
    seen = [batch.n_id[: batch.batch_size].tolist() for batch in loader]
    assert seen == [[0], [1, 2, 3, 4, 5], [6, 7]]


def test_adjacency_in_place_of_edge_index_gives_the_same():
    data = permuted(ring())
    for one, other in zip(
        SubgraphLoader(data, thirds(data)), SubgraphLoader(to_adj_t(data), thirds(data)), strict=True
    ):
        torch.testing.assert_close(one.data.adj_t.to_dense(), other.data.adj_t.to_dense(), rtol=0, atol=0)
        torch.testing.assert_close(one.data.edge_attr, other.data.edge_attr, rtol=0, atol=0)
