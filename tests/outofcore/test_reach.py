"""Which blocks can be computed part by part is seen on any graph, and nothing else is accepted."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GCNConv, InstanceNorm, SAGEConv
from torch_geometric.utils import sort_edge_index
from whole_graph_zoo import N, a_graph, plain_step, sum_of_losses, whole_step

from recollect.models import RevGNN
from recollect.outofcore import WholeGraph

PTR = torch.tensor([0, 20, 20, 50, 61, N])


def a_model(data, conv, **options) -> RevGNN:
    return RevGNN(7, 8, 4, 3, conv=conv, exact=True, **options).to(data.x.dtype)


def a_ring() -> Data:
    """Each node has one neighbour, and that one another."""
    data = a_graph()
    data.edge_index = torch.stack([torch.arange(N), torch.arange(N).roll(1)])
    return data


def loops_and_others() -> Data:
    """The nodes with the fewest edges have a self-loop, and no neighbour."""
    data = a_graph()
    ring = torch.arange(4, N)
    others = torch.stack([torch.cat([ring.roll(1), ring.roll(2)]), torch.cat([ring, ring])])
    data.edge_index = torch.cat([torch.arange(4).repeat(2, 1), others], 1)
    return data


class Two(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = SAGEConv(channels, channels), SAGEConv(channels, channels)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index), edge_index)


class TwoInTraining(Two):
    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index) if self.training else x, edge_index)


class TwoForHubs(Two):
    def forward(self, x, edge_index):
        near = self.second(x, edge_index)
        degree = torch.bincount(edge_index[1], minlength=x.size(0)).unsqueeze(1)
        return torch.where(degree > 5, self.second(self.first(x, edge_index), edge_index), near)


class TwoBehindAGate(Two):
    def forward(self, x, edge_index):
        return self.first(x, edge_index) + self.gate * self.second(self.first(x, edge_index), edge_index)


class ByDegreesOfSources(Two):
    def forward(self, x, edge_index):
        degree = torch.bincount(edge_index[0], minlength=x.size(0)).unsqueeze(1)
        return self.first(x / (1 + degree), edge_index)


class MeanInTraining(Two):
    def forward(self, x, edge_index):
        x = self.first(x, edge_index)
        return x - x.mean(0) if self.training else x


class MeanOfLarge(Two):
    def forward(self, x, edge_index):
        out = self.first(x, edge_index)
        return out - out.mean(0) if x.abs().max() > 8 else out


class Normalised(Two):
    def forward(self, x, edge_index):
        return F.batch_norm(self.first(x, edge_index), None, None, training=True)


class RunningInstance(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = SAGEConv(channels, channels), InstanceNorm(channels, track_running_stats=True)

    def forward(self, x, edge_index):
        return self.norm(self.conv(x, edge_index))


class FirstRow(Two):
    def forward(self, x, edge_index):
        return self.first(x, edge_index) + x[0]


class ByNumber(Two):
    def forward(self, x, edge_index):
        return self.first(x, edge_index) * (1 + (edge_index[0].max() > 70))


def against(channels):
    return SAGEConv(channels, channels, flow="target_to_source")


FURTHER: list[Any] = [Two, TwoInTraining, TwoForHubs, TwoBehindAGate, ByDegreesOfSources, MeanInTraining, MeanOfLarge]
FURTHER += [Normalised, RunningInstance, FirstRow, ByNumber, against]


@pytest.mark.parametrize("graph", [a_ring, loops_and_others, a_graph])
@pytest.mark.parametrize("conv", FURTHER)
def test_a_block_that_needs_more_is_refused_on_every_graph(conv, graph):
    data = graph()
    model = a_model(data, conv, norm=None)
    with pytest.raises(ValueError, match="more than the node and its neighbours"):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("graph", [a_ring, loops_and_others])
@pytest.mark.parametrize("conv", ["sage", "gcn", "gat", "gin"])
def test_a_block_of_neighbours_is_accepted_on_every_graph(conv, graph):
    data = graph()
    model = a_model(data, conv)
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_a_convolution_that_keeps_its_first_graph_is_refused_and_stays_as_it_was():
    data = a_graph()
    model = a_model(data, "gcn", conv_kwargs={"cached": True})
    with pytest.raises(ValueError, match="cached=True"):
        WholeGraph(model, data, PTR)
    model(data.x, data.edge_index)  # with nothing of a small graph in it


def test_what_is_drawn_in_training_is_no_reason_to_refuse():
    data = a_graph()
    model = a_model(data, lambda c: GATConv(c, c, dropout=0.5), dropout=0.3, shared_dropout=False)
    state = torch.get_rng_state()
    whole = WholeGraph(model, data, PTR)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole_step(whole, data)[0], whole_step(whole, data)[0])


def test_a_block_that_takes_anothers_place_is_looked_at():
    data = a_graph()
    model = a_model(data, "sage")
    whole = WholeGraph(model, data, PTR)
    whole.step(sum_of_losses(data))
    model.layers[1].convs[0].conv = Two(4).double()
    for _ in range(2):
        with pytest.raises(ValueError, match="layer 1, block 0"):
            whole.step(sum_of_losses(data))
    with pytest.raises(ValueError, match="layer 1, block 0"):
        whole.evaluate()
    model.layers[1].convs[0].conv = GCNConv(4, 4).double()  # for which parts have too few edges
    with pytest.raises(ValueError, match="make another WholeGraph"):
        whole.step(sum_of_losses(data))


class FirstEdge(Two):
    """Takes one edge into each node alone."""

    def forward(self, x, edge_index):
        edge_index = edge_index[:, torch.argsort(edge_index[1], stable=True)]
        first = edge_index[1].diff(prepend=edge_index.new_full((1,), -1)) != 0
        return self.first(x, edge_index[:, first])


def test_the_order_of_edges_is_kept_or_refused():
    data = a_graph()
    model = a_model(data, FirstEdge)
    with pytest.raises(ValueError, match="order of the edges"):
        WholeGraph(model, data, PTR)
    data.edge_index = sort_edge_index(data.edge_index, sort_by_row=False)
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


class TableOfNodes(nn.Module):
    """Has a row for each node, which it reads by row number."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.table = SAGEConv(channels, channels), nn.Embedding(N, channels)

    def forward(self, x, edge_index):
        return self.conv(x + self.table.weight[: x.size(0)], edge_index)


class TableOfNodesOfAll(TableOfNodes):
    def forward(self, x, edge_index):
        return self.conv(x + self.table.weight if x.size(0) == N else x, edge_index)


@pytest.mark.parametrize(
    ("conv", "message"), [(TableOfNodes, "did not run on a small graph"), (TableOfNodesOfAll, "goes by their number")]
)
@pytest.mark.parametrize("nodes", [N, 2 * N])
def test_a_table_by_node_number_is_refused(conv, message, nodes, monkeypatch):
    monkeypatch.setitem(globals(), "N", nodes)
    if conv is TableOfNodes and nodes > 160:
        message = "more than the node and its neighbours"
    with pytest.raises(ValueError, match=rf"layer 0, block 0.*{message}"):
        WholeGraph(a_model(a_graph(nodes), conv), a_graph(nodes), torch.tensor([0, 20, nodes]))
