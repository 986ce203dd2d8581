from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from recollect.autoscale import ScalableGNN
from recollect.models import RevGNN
from recollect.train import TrainingError, UsageError
from recollect.train._config import parse
from recollect.train.families import OwnFamily, family_of, own_family

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.seen: dict[str, torch.Tensor] = {}

    def note(self, **seen):
        self.seen = seen
        return self.head(seen["x"])


class Usual(Recorder):
    def forward(self, x, edge_index):
        return self.note(x=x, edge_index=edge_index)


class Renamed(Recorder):
    def forward(self, features, edges, scale=2.0):
        return self.note(x=features, edge_index=edges, scale=scale)


class Weighted(Recorder):
    def forward(self, x, edge_index, edge_weight=None, *, edge_attr):
        return self.note(x=x, edge_index=edge_index, edge_weight=edge_weight, edge_attr=edge_attr)


class Sparse(Recorder):
    def forward(self, x, adj_t):
        return self.note(x=x, adj_t=adj_t)


class Anything(Recorder):
    def forward(self, *args):
        return self.note(x=args[0], edge_index=args[1])


def family(model=None, words=(), call=None):
    return own_family(parse(["model=import", *words]), model, call)


def run(model, graph, words=(), call=None):
    found = family(model, words, call)
    prepared = found.prepare(graph)
    network = found.build(prepared, CPU)
    return found.call(network, found.inputs(network, prepared))


@pytest.fixture
def graph(graph_maker):
    return graph_maker("multiclass", "accuracy", 3, edge_attr=True)


@pytest.mark.parametrize("kind", [Usual, Renamed, Weighted, Anything])
def test_a_model_gets_what_its_signature_names(graph, kind):
    model = kind()
    assert run(model, graph).shape == (12, 3)
    assert model.seen["x"] is graph.data.x
    assert model.seen["edge_index"] is graph.data.edge_index
    if kind is Weighted:
        assert model.seen["edge_attr"] is graph.data.edge_attr
        assert model.seen["edge_weight"] is None


@pytest.mark.parametrize("how", ["plain", "loops", "symmetric"])
def test_an_adjacency_is_the_one_of_the_networks_with_histories(graph, how):
    model = Sparse()
    run(model, graph, [f"model.adjacency={how}"])
    expected = family_of(parse(["model=gcn", f"model.adjacency={how}"])).prepare(graph).data.adj_t
    assert torch.equal(model.seen["adj_t"].to_dense(), expected.to_dense())


class SparseOfEdges(Recorder):
    def forward(self, x, adj_t, edge_attr, edge_index=None, edge_weight=None):
        return self.note(x=x, adj_t=adj_t, edge_attr=edge_attr, edge_index=edge_index, edge_weight=edge_weight)


def test_what_edges_have_is_in_the_order_of_the_adjacency(graph):
    graph.data.edge_weight = torch.rand(graph.data.num_edges)
    graph.data.elsewhere = torch.rand(24)  # of which nobody can say what it belongs to
    model, data = SparseOfEdges(), graph.data
    run(model, graph)
    order = (data.edge_index[1] * 12 + data.edge_index[0]).argsort()
    assert torch.equal(model.seen["edge_index"], data.edge_index[:, order])
    assert torch.equal(model.seen["edge_attr"], data.edge_attr[order])
    assert torch.equal(model.seen["edge_weight"], data.edge_weight[order])
    assert torch.equal(model.seen["adj_t"].col_indices(), data.edge_index[0, order])
    with pytest.raises(UsageError, match=r"need edge_attr.*leave the adjacency plain"):
        run(model, graph, ["model.adjacency=symmetric"])


class Layered(ScalableGNN):
    inputs = ("edge_attr",)

    def __init__(self):
        super().__init__(12, hidden_channels=8, num_layers=1)
        self.head = nn.Linear(5, 3)

    def forward_layer(self, layer, x, adj_t, state):
        self.seen = state["edge_attr"]
        return self.head(x)


def test_layers_get_what_they_name_on_the_whole_graph_too(graph):
    model, data = Layered(), graph.data
    run(model, graph)
    assert torch.equal(model.seen, data.edge_attr[(data.edge_index[1] * 12 + data.edge_index[0]).argsort()])


def test_a_call_says_how_a_model_is_called(graph):
    model = Weighted()
    run(model, graph, call=lambda model, data: model(data.x, data.edge_index, edge_attr=2 * data.edge_attr))
    assert torch.equal(model.seen["edge_attr"], 2 * graph.data.edge_attr)


class Demanding(Recorder):
    def forward(self, x, edge_index, position):
        return x


class Pooled(Recorder):
    def forward(self, x, edge_index):
        return self.head(x).mean()


def test_a_model_that_cannot_be_called_is_told_what_it_was_given(graph):
    found = family(Usual().double())
    prepared = found.prepare(graph)
    network = found.build(prepared, CPU)
    inputs = found.inputs(network, prepared)
    with pytest.raises(UsageError, match=r"x float32\[12, 5\].*RuntimeError: .*dtype"):
        found.rehearse(lambda: found.call(network, inputs))


def test_a_model_with_nothing_to_train_is_refused(graph):
    with pytest.raises(UsageError, match="no parameter of the Usual is to be trained"):
        run(Usual().requires_grad_(False), graph)


def test_what_a_graph_does_not_give_is_refused(graph):
    with pytest.raises(UsageError, match=r"Demanding.forward wants 'position', and a graph gives x, .*call="):
        run(Demanding(), graph)
    with pytest.raises(UsageError, match=r"returned \[\], and a tensor of logits \[num_nodes, num_classes\]"):
        run(Pooled(), graph)


def test_reversible_modules_are_switched_and_watched(graph):
    found, model = family(), RevGNN(5, 8, 3, num_layers=4)
    found = family(model)
    prepared = found.prepare(graph)
    network = found.build(prepared, CPU)
    assert isinstance(found, OwnFamily)
    assert found.modes(network) == ["reversible", "everything kept"]
    found.call(network, found.inputs(network, prepared)).sum().backward()
    assert 0 <= found.observe(network, prepared, errors=False)["drift"] < 1e-3
    found.switch(network, second=True)
    assert model.disable
    assert found.modes(network) == ["reversible", "everything kept"]
    found.switch(network, second=False)
    assert not model.disable


def test_a_bound_of_everything_kept_counts_calls_and_not_modules(graph):
    model = RevGNN(5, 8, 3, num_layers=7, tied=True)
    found = family(model)
    prepared = found.prepare(graph)
    network = found.build(prepared, CPU)
    assert found.plain_bytes(network, prepared, [], 100) == (700, 700)


def test_a_plain_model_has_one_mode_and_nothing_to_see(graph):
    found, model = family(Usual()), Usual()
    found.build(found.prepare(graph), CPU)
    assert found.modes(model) == ["whole graph"]
    assert found.observe(model, graph, errors=True) == {}


MODULE = """
from torch import nn
from torch_geometric.nn import GraphSAGE

class Net(nn.Module):
    def __init__(self, in_channels, out_channels, hidden_channels=7, bias=True):
        super().__init__()
        self.given = (in_channels, out_channels, hidden_channels, bias)
        self.head = nn.Linear(in_channels, out_channels)
    def forward(self, x, edge_index):
        return self.head(x)

def none():
    return 3

number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("net_of_mine", "broken_of_mine"):
        sys.modules.pop(name, None)


def test_a_target_gets_the_sizes_that_it_names_and_further_arguments(graph, folder):
    words = ["model.target=net_of_mine:Net", f"model.folder={folder}", "model.kwargs.bias=false"]
    found = family(None, words)
    assert found.build(found.prepare(graph), CPU).given == (5, 3, 7, False)
    found = family(None, [*words, "model.hidden_channels=9", "model.kwargs.out_channels=4"])
    assert found.build(found.prepare(graph), CPU).given == (5, 4, 9, False)


def test_a_class_of_a_library_is_a_target(graph):
    words = ["model.target=torch_geometric.nn:GraphSAGE", "model.num_layers=2", "model.hidden_channels=8"]
    assert run(None, graph, words).shape == (12, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("null", "model=import needs model.target: write MODULE:NAME"),
        ("net_of_mine", "model.target=net_of_mine: write MODULE:NAME"),
        ("net_of_yours:Net", "No module named 'net_of_yours'"),
        ("net_of_mine:Nett", "there is no name in net_of_mine 'Nett'; did you mean Net"),
        ("net_of_mine:number", "is a int, and not a class or a function"),
        ("net_of_mine:none", "made a int, and not a torch.nn.Module"),
        ("net_of_mine:GraphSAGE", "cannot be called with in_channels, out_channels: .*num_layers"),
        ("broken_of_mine:Net", "broken_of_mine fails: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_target_is_refused(graph, folder, target, message):
    found = family(None, [f"model.target={target}", f"model.folder={folder}"])
    with pytest.raises(TrainingError, match=message):
        found.build(found.prepare(graph), CPU)


def test_parts_need_a_network_with_histories(graph):
    words = ["training=autoscale", "training.num_parts=3", "training.parts_per_batch=1", "training.partition=random"]
    found = family(Usual(), words)
    with pytest.raises(UsageError, match=r"a recollect.autoscale.ScalableGNN, and this is a Usual"):
        found.build(found.prepare(graph), CPU)


def test_edge_dropout_is_not_for_networks_whose_weights_are_unknown():
    with pytest.raises(UsageError, match="takes no notice of the edges' weights"):
        family(Usual(), ["training.edge_dropout=0.5"])
    assert math.isclose(parse(["model=gcn", "training.edge_dropout=0.5"]).training.edge_dropout, 0.5)
