import torch
from graph_zoo import edges_of, edges_of_adj_t, every_graph

from recollect.autoscale import permute, to_adj_t


@every_graph
def test_the_permuted_graph_is_the_same_graph(make):
    data = make()
    perm = torch.randperm(data.num_nodes)
    found = permute(data, perm)
    back = [(int(perm[s]), int(perm[t]), w, a) for s, t, w, a in edges_of(found)]
    assert sorted(back) == edges_of(data)
    for key in ("x", "y", "train_mask"):
        torch.testing.assert_close(found[key], data[key][perm], rtol=0, atol=0)
    assert found.node_order.tolist() == perm.tolist()


@every_graph
def test_adjacency_and_edge_index_are_permuted_alike(make):
    data = make()
    perm = torch.randperm(data.num_nodes)
    one, other = to_adj_t(permute(data, perm)), permute(to_adj_t(data), perm)
    assert edges_of_adj_t(one.adj_t, one.edge_attr) == edges_of_adj_t(other.adj_t, other.edge_attr)
    assert edges_of_adj_t(other.adj_t, other.edge_attr) == edges_of(permute(data, perm))
