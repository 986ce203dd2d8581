"""Convolutions of torch_geometric that get one tensor of features with a mini-batch's adjacency."""

from __future__ import annotations

import pytest
import torch
from torch_geometric import nn as geometric
from torch_geometric.data import Data

from recollect.autoscale import ScalableGNN, SubgraphLoader, partition, permute, to_adj_t


class Net(ScalableGNN):
    def __init__(self, conv, pair=False):
        super().__init__(12, 4, 1)
        self.conv, self.pair = conv, pair

    def forward_layer(self, layer, x, adj_t, state):
        return self.conv((x, x[: adj_t.size(0)]) if self.pair else x, adj_t)


@pytest.fixture
def batch():
    ring = torch.arange(12)
    data = to_adj_t(Data(x=torch.randn(12, 4), edge_index=torch.stack([ring, ring.roll(1)])))
    perm, ptr = partition(data.adj_t, 3, "contiguous", log=False)
    return next(iter(SubgraphLoader(permute(data, perm, log=False), ptr, log=False)))


CONVS = {
    "sage": lambda: geometric.SAGEConv(4, 4),
    "graph": lambda: geometric.GraphConv(4, 4),
    "gat": lambda: geometric.GATConv(4, 4, add_self_loops=False),
    "gin": lambda: geometric.GINConv(torch.nn.Linear(4, 4)),
    "gcn": lambda: geometric.GCNConv(4, 4),
}


@pytest.mark.parametrize("name", list(CONVS))
def test_the_error_names_the_remedy(name, batch):
    with pytest.raises(ValueError, match=r"4 targets and 5 sources, .* \(x, x\[: adj_t\.size\(0\)\]\)") as caught:
        Net(CONVS[name]())(batch.data.x, batch.data.adj_t, *batch[1:])
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["sage", "graph", "gat", "gin"])
def test_the_remedy_works(name, batch):
    out = Net(CONVS[name](), pair=True)(batch.data.x, batch.data.adj_t, *batch[1:])
    assert out.shape == (4, 4)


def test_other_errors_are_left_alone(batch):
    def fail(x, adj_t):
        raise ValueError("something else")

    with pytest.raises(ValueError, match=r"^something else$"):
        Net(fail)(batch.data.x, batch.data.adj_t, *batch[1:])
