"""`for_targets` lets convolutions return rows for the first nodes alone, and the same ones."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch_geometric.nn import GATConv, GCNConv, GINConv, GraphConv, SAGEConv, TransformerConv

from recollect.messages import convolve, for_targets

N, TARGETS, CHANNELS = 14, 5, 4


def mlp():
    return nn.Sequential(nn.Linear(CHANNELS, 6), nn.Tanh(), nn.Linear(6, CHANNELS))


class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(CHANNELS), conv

    def forward(self, x, edge_index):
        return self.conv(self.norm(x).relu(), edge_index)


CONVS = {
    "sage": lambda: SAGEConv(CHANNELS, CHANNELS),
    "sage, largest": lambda: SAGEConv(CHANNELS, CHANNELS, aggr="max"),
    "graph": lambda: GraphConv(CHANNELS, CHANNELS),
    "gin": lambda: GINConv(mlp()),
    "gat": lambda: GATConv(CHANNELS, CHANNELS),
    "transformer, which is given a pair": lambda: TransformerConv(CHANNELS, CHANNELS),
}


def into_targets():
    torch.manual_seed(0)
    return torch.stack([torch.randint(N, (40,)), torch.randint(TARGETS, (40,))])


@pytest.mark.parametrize("name", CONVS)
def test_the_first_rows_and_their_gradients(name):
    edge_index = into_targets()
    block = Block(CONVS[name]()).double()
    x = torch.randn(N, CHANNELS, dtype=torch.float64, requires_grad=True)
    whole = convolve(block, x, edge_index)[:TARGETS]
    with for_targets(TARGETS):
        found = convolve(block, x, edge_index)
    assert found.shape == (TARGETS, CHANNELS)
    assert_close(found, whole, rtol=1e-12, atol=1e-12)
    inputs = [x, *block.parameters()]
    expected = torch.autograd.grad(whole.sin().sum(), inputs)
    assert_close(torch.autograd.grad(found.sin().sum(), inputs), expected, rtol=1e-12, atol=1e-12)


def test_degrees_count_all_edges():
    edge_index = torch.cat([into_targets(), torch.tensor([[0, 1, 13], [6, 7, 8]])], 1)
    conv = GCNConv(CHANNELS, CHANNELS).double()
    x = torch.randn(N, CHANNELS, dtype=torch.float64)
    whole = convolve(conv, x, edge_index)
    with for_targets(TARGETS):
        assert_close(convolve(conv, x, edge_index), whole[:TARGETS], rtol=1e-12, atol=1e-12)
    assert_close(convolve(conv, x, edge_index), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CONVS, "gcn, which takes no pair"])
def test_without_edges(name):
    conv = CONVS[name]() if name in CONVS else GCNConv(CHANNELS, CHANNELS)
    edge_index, block = torch.empty(2, 0, dtype=torch.int64), Block(conv).double()
    x = torch.randn(N, CHANNELS, dtype=torch.float64)
    with for_targets(TARGETS):
        found = convolve(block, x, edge_index)
    assert_close(found, convolve(block, x, edge_index)[:TARGETS], rtol=1e-12, atol=1e-12)


def test_it_ends_with_the_body_and_counts_in_its_thread_alone():
    edge_index, conv = into_targets(), SAGEConv(CHANNELS, CHANNELS)
    x = torch.randn(N, CHANNELS)
    with for_targets(TARGETS):
        with pytest.raises(RuntimeError, match="shapes"), for_targets(2):
            convolve(conv, x[:, :2], edge_index[:, edge_index[1] < 2])
        assert convolve(conv, x, edge_index).size(0) == TARGETS
    assert convolve(conv, x, edge_index).size(0) == N
    assert conv(x, edge_index).size(0) == N
