import pytest
import torch
from graph_zoo import every_graph
from torch_geometric.data import Data

from recollect.autoscale import to_adj_t
from recollect.autoscale.partitioning._undirected import undirected


@every_graph
@pytest.mark.parametrize("weighted", [False, True])
def test_neighbours_are_those_that_loops_find(make, weighted):
    adj_t = to_adj_t(make()).adj_t
    rowptr, col, value = (part.tolist() for part in (adj_t.crow_indices(), adj_t.col_indices(), adj_t.values()))
    neighbours: list[dict] = [{} for _ in range(adj_t.size(0))]
    for row in range(adj_t.size(0)):
        for k in range(rowptr[row], rowptr[row + 1]):
            for here, there in ((row, col[k]), (col[k], row)):
                if here != there:
                    neighbours[here][there] = neighbours[here].get(there, 0.0) + value[k]
    heaviest = max((weight for there in neighbours for weight in there.values()), default=1.0)
    found = undirected(adj_t, weighted)
    for node, there in enumerate(neighbours):
        rows = slice(found.rowptr[node], found.rowptr[node + 1])
        assert found.col[rows].tolist() == sorted(there)
        if weighted:
            wanted = [max(1, round(there[n] / heaviest * 10_000)) for n in sorted(there)]
            assert found.weight[rows].tolist() == wanted
    assert (found.weight is not None) == weighted


def test_whole_weights_stay_as_they_are():
    edge_index, edge_weight = torch.tensor([[0, 1, 1], [1, 0, 2]]), torch.tensor([2.0, 1.0, 0.0])
    adj_t = to_adj_t(Data(edge_index=edge_index, edge_weight=edge_weight, num_nodes=3)).adj_t
    assert undirected(adj_t, True).weight.tolist() == [3, 3, 1, 1]  # a weight of zero becomes one
