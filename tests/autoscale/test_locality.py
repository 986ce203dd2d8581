"""Layers that need more than a mini-batch has are refused; all others return what the whole graph has."""

import copy

import pytest
import torch
from torch import nn
from torch_geometric import nn as geometric
from torch_geometric.data import Data

from recollect.autoscale import (
    EvalSubgraphLoader,
    ScalableGNN,
    SubgraphLoader,
    edge_index_of,
    partition,
    permute,
    propagate,
    to_adj_t,
)

N, C = 40, 4


def a_graph(isolated: int = 0):
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(isolated, N, (2, 160), generator=generator)
    features = {"x": torch.randn(N, C, dtype=torch.float64, generator=generator)}
    features["edge_attr"] = torch.rand(160, 3, dtype=torch.float64, generator=generator)
    data = to_adj_t(Data(**features, edge_index=edge_index))
    perm, ptr = partition(data.adj_t, 4, "contiguous", log=False)
    return permute(data, perm, log=False), ptr


class Net(ScalableGNN):
    """Layers that are a function of features, targets first, edges and what the edges have."""

    inputs = ("edge_attr",)

    def __init__(self, make, **options):
        super().__init__(N, C, 3, history_dtype=torch.float64, **options)
        torch.manual_seed(0)
        self.parts = nn.ModuleList(make() for _ in range(3))
        self.double()

    def forward_layer(self, layer, x, adj_t, state):
        edge_index, size = edge_index_of(adj_t), adj_t.size(0)
        return self.parts[layer](x.tanh(), edge_index, state["edge_attr"], size)


class Conv(nn.Module):
    def __init__(self, conv, pair=True, edges=False):
        super().__init__()
        self.conv, self.pair, self.edges = conv, pair, edges

    def forward(self, x, edge_index, edge_attr, size):
        given = (x, x[:size]) if self.pair else x
        return self.conv(given, edge_index, *([edge_attr] if self.edges else []))[:size]


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = geometric.SAGEConv(C, C), norm

    def forward(self, x, edge_index, edge_attr, size):
        return self.norm(self.conv((x, x[:size]), edge_index))


FURTHER = {
    "degrees of neighbours": lambda: Conv(geometric.GCNConv(C, C), pair=False),
    "two steps": lambda: Conv(geometric.TAGConv(C, C, K=2, normalize=False), pair=False),
    "Chebyshev polynomials": lambda: Conv(geometric.ChebConv(C, C, 3), pair=False),
    "a norm over nodes": lambda: Normed(geometric.GraphNorm(C)),
    "a norm of pairs": lambda: Normed(geometric.PairNorm()),
    "a norm over the graph": lambda: Normed(geometric.LayerNorm(C)),
}
NEAR = {
    "mean": lambda: Conv(geometric.SAGEConv(C, C)),
    "several": lambda: Conv(geometric.SAGEConv(C, C, aggr=["mean", "std", "max"])),
    "attention": lambda: Conv(geometric.GATv2Conv(C, C, edge_dim=3, add_self_loops=False), edges=True),
    "transformer": lambda: Conv(geometric.TransformerConv(C, C, edge_dim=3), edges=True),
    "edges": lambda: Conv(geometric.GINEConv(nn.Linear(C, C), edge_dim=3), edges=True),
    "one step": lambda: Conv(geometric.TAGConv(C, C, K=1, normalize=False), pair=False),
    "a norm over channels": lambda: Normed(nn.LayerNorm(C)),
    "a batch norm": lambda: Normed(nn.BatchNorm1d(C)),
}


def call(model, batch):
    return model(batch.data.x, batch.data.adj_t, *batch[1:], edge_attr=batch.data.edge_attr)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", FURTHER)
def test_layers_that_need_more_are_refused(kind, training):
    data, ptr = a_graph()
    model = Net(FURTHER[kind]).train(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer 0 of the Net returns for a node what depends on more"):
        call(model, next(iter(SubgraphLoader(data, ptr, log=False))))
    with pytest.raises(ValueError, match="layer 0 of the Net returns for a node what depends on more"):
        model(loader=EvalSubgraphLoader(data, ptr, log=False))
    assert all(history.table.clock.pushes == 0 for history in model.tables)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", NEAR)
def test_layers_that_need_no_more_are_those_of_the_whole_graph(kind):
    data, ptr = a_graph()
    model = Net(NEAR[kind]).eval()
    whole = model(data.x, data.adj_t, edge_attr=data.edge_attr)
    batches, state = list(SubgraphLoader(data, ptr, log=False)), torch.get_rng_state()
    for batch in batches:
        torch.testing.assert_close(call(model, batch), whole[batch.n_id[: batch.batch_size]], rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    found = model(loader=EvalSubgraphLoader(data, ptr, log=False))
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_a_first_mini_batch_without_edges_says_nothing():
    data, ptr = a_graph(isolated=10)
    model = Net(FURTHER["degrees of neighbours"]).eval()
    first, second, *_ = SubgraphLoader(data, ptr, log=False)
    assert not first.data.adj_t.values().numel()
    call(model, first)
    with pytest.raises(ValueError, match="degrees of neighbours"):
        call(model, second)


def others_in_a_list(model):
    model.parts = nn.ModuleList([*model.parts[:2], FURTHER["a norm over nodes"]().double()])


def another_in_the_list(model):
    model.parts[2] = FURTHER["a norm over nodes"]().double()


def a_setting(model):
    model.parts[2].conv.normalize = True


@pytest.mark.parametrize("change", [others_in_a_list, another_in_the_list, a_setting])
def test_what_changes_in_layers_is_looked_at(change):
    data, ptr = a_graph()
    model = Net(lambda: Conv(geometric.GCNConv(C, C, normalize=False), pair=False)).eval()
    batch = next(iter(SubgraphLoader(data, ptr, log=False)))
    call(model, batch)
    change(model)
    with pytest.raises(ValueError, match="layer 2 of the Net"):
        call(model, batch)


def test_layers_that_stay_are_looked_at_once(monkeypatch):
    data, ptr = a_graph()
    model, looks = Net(NEAR["mean"]), []
    monkeypatch.setattr("recollect.autoscale._scalable.check_locality", lambda *args: looks.append(args) or True)
    for batch in SubgraphLoader(data, ptr, log=False):
        call(model, batch).sum().backward()
    assert len(looks) == 1


class Remembering(Net):
    """Keeps what it computed of the first graph, counts its layers, and reads the state of earlier ones."""

    def __init__(self):
        super().__init__(NEAR["mean"])
        self.calls, self.seen = 0, {}

    def forward_layer(self, layer, x, adj_t, state):
        self.calls += 1
        self.seen.setdefault(layer, x.size(0))
        state.setdefault("first", x[: adj_t.size(0)])
        return super().forward_layer(layer, x, adj_t, state) + propagate(adj_t, x) + state["first"]

    def readout(self, x, state):
        return x * state["first"]


def test_the_network_stays_as_it_is():
    data, ptr = a_graph()
    model = Remembering().eval()
    whole = model(data.x, data.adj_t, edge_attr=data.edge_attr)
    model.calls, model.seen = 0, {}
    batch = next(iter(SubgraphLoader(data, ptr, log=False)))
    torch.testing.assert_close(call(model, batch), whole[: batch.batch_size], rtol=1e-9, atol=1e-9)
    assert (model.calls, model.seen) == (3, dict.fromkeys(range(3), len(batch.n_id)))


class ByNumber(Net):
    def __init__(self):
        super().__init__(NEAR["mean"])
        self.table = nn.Embedding(N, C).double()

    def forward_layer(self, layer, x, adj_t, state):
        own = self.table.weight if adj_t.size(0) == N else self.table.weight[: adj_t.size(0)]
        if adj_t.size(0) > N:
            raise IndexError("no such row")
        return super().forward_layer(layer, x, adj_t, state) + own


def test_what_cannot_run_on_another_graph_is_not_looked_at():
    data, ptr = a_graph()
    out = call(ByNumber(), next(iter(SubgraphLoader(data, ptr, log=False))))
    assert out.isfinite().all()
