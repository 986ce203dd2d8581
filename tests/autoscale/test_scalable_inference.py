"""Layer-wise inference in mini-batches is the whole graph's."""

from __future__ import annotations

import pytest
import torch
from graph_zoo import directed
from scalable_zoo import IN, NODES, OUT, PTR, Handwritten, Mean, batches, make_graph, tables
from torch import nn

from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader, permute, propagate, to_adj_t


def exact(model, data):
    """Outputs of all layers of the whole graph, in evaluation mode."""
    training, found, x = model.training, [], data.x
    state: dict = {}
    model.eval()
    with torch.no_grad():
        for layer in range(model.num_layers):
            x = model.forward_layer(layer, x, data.adj_t, state)
            found.append(x)
    model.train(training)
    return found


class Normed(ScalableGNN):
    """Batch norm and dropout in each layer."""

    def __init__(self) -> None:
        super().__init__(NODES, 5, 3, history_dtype=torch.float64)
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in ((IN, 5), (5, 5), (5, OUT)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in (5, 5, OUT))
        self.dropout = nn.Dropout(0.5)

    def forward_layer(self, layer, x, adj_t, state):
        return self.dropout(self.norms[layer](self.lins[layer](propagate(adj_t, x))))


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"bipartite": False}, {"adjacency": "edge_index"}], ids=str)
def test_outputs_and_histories(options):
    model, data = Mean(), make_graph()
    loader = EvalSubgraphLoader(data, PTR, **options)
    *hidden, out = exact(model, data)
    torch.testing.assert_close(model(loader=loader), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tables(model), hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.mini_inference(loader), out, rtol=1e-12, atol=1e-12)


def test_a_model_in_training_mode_is_evaluated_in_evaluation_mode_and_given_back():
    torch.manual_seed(0)
    model, data = Normed().double(), make_graph()
    for _ in range(3):
        model(data.x, data.adj_t)  # statistics that differ from the batches'
    expected = exact(model, data)[-1]
    model.norms[1].eval()  # a user froze this one
    modes = [module.training for module in model.modules()]
    statistics = [buffer.clone() for buffer in model.buffers()]
    out = model(loader=EvalSubgraphLoader(data, PTR))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
    assert not out.requires_grad


def test_modes_are_given_back_after_an_error():
    model = Mean()
    with pytest.raises(ZeroDivisionError):
        model(loader=(1 // 0 for _ in range(1)))
    assert model.training


def test_the_loader_may_stand_where_it_does_in_the_signature_and_stands_alone():
    model, data = Mean(), make_graph()
    loader = EvalSubgraphLoader(data, PTR)
    out = model(loader=loader)
    assert torch.equal(model(None, None, None, None, None, None, loader), out)
    for given in ({"x": data.x}, {"adj_t": data.adj_t}, {"batch_size": 3}, {"edge_attr": data.x}):
        with pytest.raises(ValueError, match="give nothing else beside it"):
            model(loader=loader, **given)


class TestLoaders:
    @pytest.mark.parametrize(
        "loader",
        [
            lambda data: batches(data)[1:],
            lambda data: [*batches(data)[1:], batches(data)[1]],  # as many nodes as there should be, or more
            lambda data: [],
        ],
        ids=["some are missing", "one is there twice", "none"],
    )
    def test_nodes_that_are_missing_or_there_twice(self, loader):
        with pytest.raises(ValueError, match=r"needs each of the 20 nodes of the histories once; use EvalSubgraph"):
            Mean()(loader=loader(make_graph()))

    @pytest.mark.parametrize("loader", [lambda data: [data], lambda data: [1]], ids=["graphs", "numbers"])
    def test_what_yields_no_mini_batches(self, loader):
        with pytest.raises(TypeError, match=r"must yield mini-batches, each a SubData \(found (Data|int)\)"):
            Mean()(loader=loader(make_graph()))

    def test_a_loader_of_another_graph_leaves_the_histories_alone(self):
        model = Mean()
        data = permute(to_adj_t(directed()), torch.arange(9), log=False)
        found = model(loader=EvalSubgraphLoader(data, torch.tensor([0, 4, 9])))
        torch.testing.assert_close(found, model.eval()(data.x, data.adj_t), rtol=1e-12, atol=1e-12)
        assert model.never_pushed() == 3 * [NODES]

    def test_the_order_of_mini_batches_does_not_matter(self):
        model, data = Mean(), make_graph()
        loader = SubgraphLoader(data, PTR, shuffle=True, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(loader=loader), exact(model, data)[-1], rtol=1e-12, atol=1e-12)

    def test_other_mini_batches_in_each_pass(self):
        loader = SubgraphLoader(make_graph(), PTR, 2, shuffle=True, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="the same mini-batches in every pass"):
            Mean()(loader=loader)

    def test_a_list_of_mini_batches_and_workers(self):
        model, data = Mean(), make_graph()
        out = exact(model, data)[-1]
        torch.testing.assert_close(model(loader=batches(data)), out, rtol=1e-12, atol=1e-12)


def test_features_that_are_no_floats():
    class Embedded(Mean):
        def forward_layer(self, layer, x, adj_t, state):
            if layer == 0:
                x = torch.eye(IN, dtype=torch.float64)[x]
            return super().forward_layer(layer, x, adj_t, state)

    model, data = Embedded(), make_graph()
    data.x = torch.arange(NODES) % IN
    torch.testing.assert_close(
        model(loader=EvalSubgraphLoader(data, PTR)), exact(model, data)[-1], rtol=1e-12, atol=1e-12
    )


def test_what_layers_leave_in_their_state_and_what_the_data_gives_them():
    class Stateful(ScalableGNN):
        """Its state has tensors, a tuple, a number; it needs `extra` of the data."""

        inputs = ("extra",)

        def forward_layer(self, layer, x, adj_t, state):
            own = x[: adj_t.size(0)]
            if layer == 0:
                state |= {"seen": (own, {"twice": 2 * own}), "calls": 0}
            state["calls"] += 1
            extra = state["extra"][: adj_t.size(0)]
            return propagate(adj_t, x) + state["seen"][0] * state["calls"] + state["seen"][1]["twice"] * extra

    data = make_graph()
    data.extra = torch.rand(NODES, 1, dtype=torch.float64)
    model = Stateful(NODES, IN, 3, history_dtype=torch.float64)
    x = data.x
    for calls in (1, 2, 3):
        x = data.adj_t @ x + data.x * calls + 2 * data.x * data.extra
    torch.testing.assert_close(
        model(loader=EvalSubgraphLoader(data, PTR, kinds={"extra": "node"})), x, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(model(data.x, data.adj_t, extra=data.extra), x, rtol=1e-12, atol=1e-12)


def test_what_waits_for_the_next_layer_has_no_rows_of_the_halo():
    """For all mini-batches together as many as there are nodes."""
    waiting = []

    class Keeping(Mean):
        def forward_layer(self, layer, x, adj_t, state):
            if layer == 1:
                waiting.append(state["own"].untyped_storage().nbytes())
            else:
                state["own"] = x[: adj_t.size(0)]
            return super().forward_layer(layer, x, adj_t, state)

    model, loader = Keeping(), EvalSubgraphLoader(make_graph(), PTR)
    model(loader=loader)  # layers are looked at
    waiting.clear()
    model(loader=loader)
    assert sum(waiting) == NODES * IN * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_lossy_histories_are_as_exact_as_they_are(dtype):
    model, data = Mean(history_dtype=dtype), make_graph()
    out = model(loader=EvalSubgraphLoader(data, PTR))
    error = (out - exact(model, data)[-1]).norm() / exact(model, data)[-1].norm()
    assert 0 < error < 0.05


class Scaled(Mean):
    def forward(self, x, *args):
        return super().forward(2 * x, *args)


class Doubled(Handwritten):
    """Does not say of its own forward what its base says of another."""

    def forward(self, x, *args):
        return 2 * Handwritten.forward(self, x, *args)


def test_what_would_not_be_called_is_refused():
    everything = EvalSubgraphLoader(make_graph(), PTR)
    for kind in (Scaled, Doubled):
        with pytest.raises(TypeError, match=rf"{kind.__name__} has a forward of its own.*layers_written_out = True"):
            kind()(loader=everything)
    Handwritten()(loader=everything)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = Mean()
        getattr(model, register)(lambda module, *args: None)
        before = tables(model)
        with pytest.raises(ValueError, match=r"the network \(Mean\) has forward_"):
            model(loader=everything)
        torch.testing.assert_close(tables(model), before, rtol=0, atol=0)
