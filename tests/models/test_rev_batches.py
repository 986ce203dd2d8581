"""`RevGNN` on mini-batches with histories, against the whole graph and against its formula written out."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any

import pytest
import torch
from rev_batches_zoo import IN, NODES, OUT, Data, call, make_graph, make_model, written_out
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from recollect.autogram import Engine
from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, history_errors, normalize, to_adj_t
from recollect.autoscale._blocks import edges_of
from recollect.data._foreign import require
from recollect.frames import InPlaceError
from recollect.memory import peak_memory
from recollect.models import RevGNN

geometric: Any = require("torch_geometric.nn", extra="graph")

CONVS = ["gat", "gen", "gin", "graphconv", "sage"]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_one_part_is_the_whole_graph(exact, shared, dropout):
    data, ptr = make_graph(1)
    model = make_model(dropout=dropout, shared_dropout=shared, exact=exact)
    plain = make_model(dropout=dropout, shared_dropout=shared, exact=exact, num_nodes=None)
    plain.load_state_dict(model.state_dict())
    (batch,) = SubgraphLoader(data, ptr)
    torch.manual_seed(3)
    out = call(model, batch)
    torch.manual_seed(3)
    expected = plain(data.x, edge_index_of(data))
    assert torch.equal(out, expected)
    close(gradients(out.square().sum(), model), gradients(expected.square().sum(), plain))


def edge_index_of(data):
    row = torch.repeat_interleave(torch.arange(NODES), data.adj_t.crow_indices().diff())
    return torch.stack([data.adj_t.col_indices(), row])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_outputs_with_true_histories_are_those_of_the_whole_graph(groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=24, num_groups=groups, conv=conv)
    true = model.eval()(data.x, data.adj_t)
    for batch in SubgraphLoader(data, ptr, batch_size=2):
        close([call(model, batch)], [true[batch.n_id[: batch.batch_size]]])


def compared(model, data, ptr):
    """Compare a step on each mini-batch with the formula; yield the batch, the rows before it, and the layers' rows."""
    for seed, batch in enumerate(SubgraphLoader(data, ptr, batch_size=2)):
        tables = [history.pull() for history in model.histories]
        torch.manual_seed(seed)
        expected, outputs = written_out(model, batch, tables)
        torch.manual_seed(seed)
        out = call(model, batch)
        close([out], [expected])
        close(gradients(out.square().sum(), model), gradients(expected.square().sum(), model))
        yield batch, tables, outputs


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_plain_model_with_halo_rows_as_constants(dropout, groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=24, num_groups=groups, conv=conv, dropout=dropout)
    model(loader=EvalSubgraphLoader(data, ptr))
    for batch, tables, outputs in compared(model, data, ptr):
        own = batch.n_id[: batch.batch_size]
        for table, history, rows in zip(tables, model.histories, outputs, strict=True):
            table[own] = rows.detach()
            close([history.pull()], [table])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3])
def test_inference_by_parts_is_the_whole_graph_and_fills_the_histories(groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=12, num_groups=groups, conv=conv, dropout=0.5)
    out = model(loader=EvalSubgraphLoader(data, ptr, batch_size=2))
    tables = [history.pull() for history in model.histories]
    close([out], [model.eval()(data.x, data.adj_t)])
    close(tables, [history.pull() for history in model.histories])
    assert model.never_pushed() == [0, 0, 0]
    assert max(history_errors(model, data)) < 1e-12
    assert max(history_errors(model, EvalSubgraphLoader(data, ptr))) < 1e-12


def test_a_row_that_somebody_pushed_before_backward_is_noticed():
    data, ptr = make_graph()
    model = make_model()
    model(loader=EvalSubgraphLoader(data, ptr))
    first, second = list(SubgraphLoader(data, ptr, batch_size=2))
    loss = call(model, first).sum()
    call(model, second)
    with pytest.raises(InPlaceError, match=r"pushed again .* backward before the next forward pass"):
        loss.backward()


def test_each_history_is_pulled_once_forward_and_once_backward(monkeypatch):
    data, ptr = make_graph()
    model = make_model(num_layers=4, num_groups=4)
    model(loader=EvalSubgraphLoader(data, ptr))
    counts = {id(history): 0 for history in model.histories}
    for history in model.histories:

        def pull(n_id=None, history=history, original=history.pull):
            counts[id(history)] += 1
            return original(n_id)

        monkeypatch.setattr(history, "pull", pull)
    batch = next(iter(SubgraphLoader(data, ptr)))
    loss = call(model, batch).sum()
    assert list(counts.values()) == [1] * 4
    loss.backward()
    assert list(counts.values()) == [2] * 4


@pytest.mark.parametrize("options", [{"history_dtype": torch.int8}, {"history_path": "here"}, {"pool_size": 2}])
def test_other_histories_are_pulled_again_as_they_are(options, tmp_path):
    data, ptr = make_graph()
    if "history_path" in options:
        options = options | {"history_path": tmp_path / "tables"}
    if "pool_size" in options:
        options = options | {"buffer_size": NODES}
    model = make_model(num_groups=4, dropout=0.3, **options)
    model(loader=EvalSubgraphLoader(data, ptr))
    assert len(list(compared(model, data, ptr))) > 1


class Degrees(geometric.MessagePassing):
    """Divides what a neighbour sends by the edges into that neighbour."""

    def forward(self, x, edge_index):
        count = torch.bincount(edge_index[1], minlength=x.size(0)).clamp(min=1).to(x.dtype)
        return self.propagate(edge_index, x=x / count[:, None])

    def message(self, x_j):
        return x_j


@pytest.mark.parametrize(
    "conv",
    [
        lambda channels: geometric.GCNConv(channels, channels),
        lambda channels: Degrees(),
        lambda channels: Twice(channels),
    ],
    ids=["gcn", "degrees", "two convolutions"],
)
def test_what_needs_more_than_the_edges_into_a_node_is_refused(conv):
    data, ptr = make_graph()
    model = make_model(conv=conv)
    batch = next(iter(SubgraphLoader(data, ptr)))
    before = [history.pull() for history in model.histories]
    with pytest.raises(ValueError, match=r"layer 0, block 0.*depends on more than the node and the edges into it"):
        call(model, batch)
    close([history.pull() for history in model.histories], before)
    assert model.training


class Hops(nn.Module):
    """Goes along as many edges as a setting says, of which its repr says nothing."""

    def __init__(self, channels, hops=1):
        super().__init__()
        self.lin = nn.Linear(channels, channels)
        self.hops = hops

    def forward(self, x, edge_index):
        for _ in range(self.hops):
            x = torch.zeros_like(x).index_add(0, edge_index[1], self.lin(x)[edge_index[0]])
        return x


def one_of_them_further():
    count = itertools.count()
    return make_model(conv=lambda channels: Hops(channels, 1 + (next(count) == 2)))


def further_later():
    model = make_model(conv=Hops)
    call(model, next(iter(SubgraphLoader(*make_graph()))))
    model.layers[1].convs[1].conv.hops = 2
    return model


def another_later():
    model = make_model(conv="sage")
    call(model, next(iter(SubgraphLoader(*make_graph()))))
    model.layers[2].convs[0].conv = Twice(4).double()
    return model


def of_another_graph():
    model = make_model(conv=Hops)
    call(model, next(iter(SubgraphLoader(*make_graph()))))
    other = model.for_graph(NODES)
    other.layers[1].convs[0].conv.hops = 2
    return other


@pytest.mark.parametrize("make", [one_of_them_further, further_later, another_later, of_another_graph])
def test_a_block_that_looks_further_is_found_wherever_and_whenever_it_comes(make):
    data, ptr = make_graph()
    model = make()
    with pytest.raises(ValueError, match=r"layer [12], block [01].*depends on more than the node"):
        call(model, next(iter(SubgraphLoader(data, ptr))))
    with pytest.raises(ValueError, match=r"layer [12], block [01].*depends on more than the node"):
        model(loader=EvalSubgraphLoader(data, ptr))


class Centred(RevGNN):
    def embed(self, x):
        return super().embed(x - x.mean(0))


class Numbered(RevGNN):
    """Adds to each row what belongs to its number."""

    def embed(self, x):
        return super().embed(x + torch.arange(x.size(0), dtype=x.dtype)[:, None])


class Mixing(RevGNN):
    def classify(self, x, mask=None):
        return super().classify(x, mask).cumsum(0)


class Scaled(RevGNN):
    def forward(self, x, edge_index, *args, **inputs):
        return super().forward(2 * x, edge_index, *args, **inputs)


@pytest.mark.parametrize("kind", [Centred, Numbered, Mixing])
def test_what_does_not_go_row_by_row_is_refused(kind):
    data, ptr = make_graph()
    model = kind(IN, 8, OUT, 2, num_nodes=NODES).double()
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.(embed|classify).*rows"):
        call(model, next(iter(SubgraphLoader(data, ptr))))
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.(embed|classify).*rows"):
        model(loader=EvalSubgraphLoader(data, ptr))


def test_what_a_loaders_evaluation_would_not_call_is_refused():
    data, ptr = make_graph()
    everything = EvalSubgraphLoader(data, ptr)
    with pytest.raises(TypeError, match="Scaled has a forward of its own"):
        Scaled(IN, 8, OUT, 2, num_nodes=NODES)(loader=everything)
    for place in ("", "layers.1"):
        model = make_model()
        model.get_submodule(place).register_forward_hook(lambda module, args, out: 2 * out)
        with pytest.raises(ValueError, match=f"{place or 'the network'}.*forward_hooks"):
            model(loader=everything)
    model = make_model()  # those of modules that layers run are called
    model.layers[1].convs[0].conv.register_forward_hook(lambda module, args, out: 2 * out)
    close(model(loader=everything), model.eval()(data.x, data.adj_t))


def test_weights_that_a_hook_computes():
    data, ptr = make_graph()
    model = make_model(conv=Hops)
    model.layers[0].convs[0].conv.lock = threading.Lock()
    prune.l1_unstructured(model.layers[1].convs[0].conv.lin, "weight", 0.5)
    prune.l1_unstructured(model.head, "weight", 0.5)
    assert len(list(compared(model, data, ptr))) > 1


def test_blocks_are_looked_at_once(monkeypatch):
    data, ptr = make_graph()
    model = make_model()
    looks = []
    monkeypatch.setattr(model, "check_parts", lambda x, args: looks.append(args))
    for _ in range(2):
        for batch in SubgraphLoader(data, ptr):
            call(model, batch).sum().backward()
        model(loader=EvalSubgraphLoader(data, ptr))
    assert len(looks) == 1


@pytest.mark.parametrize("first", ["no edges", "edges of weight 0", "edges of weight 1"])
def test_blocks_are_looked_at_whatever_the_first_mini_batch_has(first):
    """A convolution that divides by degrees, weighted ones, of neighbours, and one that does so by their logarithms."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(10, NODES, (2, 120), generator=generator)
    weight = torch.rand(120, dtype=torch.float64, generator=generator) + 0.5
    if first != "no edges":
        into = torch.randint(NODES, (2, 20), generator=generator) % torch.tensor([[NODES], [10]])
        edge_index = torch.cat([edge_index, into], 1)
        weight = torch.cat([weight, torch.full((20,), float(first[-1]), dtype=torch.float64)])
    x = torch.randn(NODES, IN, dtype=torch.float64, generator=generator)
    data = to_adj_t(Data(x=x, edge_index=edge_index, edge_weight=weight))
    data.node_order = torch.arange(NODES)
    kinds = [lambda c: geometric.GCNConv(c, c)] if first != "edges of weight 1" else [LogDegrees]
    for conv in kinds:
        model = make_model(conv=conv, inputs=("edge_weight",)).eval()
        whole = model(data.x, data.adj_t)  # fills the histories
        first_batch, second_batch, *_ = SubgraphLoader(data, torch.arange(0, NODES + 1, 10))
        with pytest.raises(ValueError, match="neighbours' degrees"):  # noqa: PT012 - in the first or the second
            close([call(model, first_batch)], [whole[:10]])
            call(model, second_batch)


class LogDegrees(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.lin = nn.Linear(channels, channels)

    def forward(self, x, edge_index, edge_weight):
        source, target = edge_index
        degree = x.new_zeros(x.size(0)).index_add_(0, target, edge_weight.abs().log().abs())
        return self.lin(torch.zeros_like(x).index_add_(0, target, x[source] * degree[source, None]))


class Twice(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(geometric.SAGEConv(channels, channels) for _ in range(2))

    def forward(self, x, edge_index):
        for conv in self.convs:
            x = conv(x, edge_index).tanh()
        return x


def test_batch_normalisation_is_that_of_the_mini_batch():
    data, ptr = make_graph()
    model = make_model(norm="batch")
    call(model, next(iter(SubgraphLoader(data, ptr)))).sum().backward()


def test_the_gramian_of_many_losses_is_that_of_the_explicit_jacobian():
    data, ptr = make_graph()
    model = make_model(num_layers=4, hidden=12, num_groups=3, dropout=0.3)
    model(loader=EvalSubgraphLoader(data, ptr))
    engine, calls = Engine(model), []
    for layer in model.layers:
        for conv in layer.convs:
            conv.register_forward_pre_hook(lambda module, args: calls.append(module))
    for seed, batch in enumerate(SubgraphLoader(data, ptr, batch_size=2)):
        tables = [history.pull() for history in model.histories]
        target = batch.data.y[: batch.batch_size].double()
        torch.manual_seed(seed)
        logits, _ = written_out(model, batch, tables)
        expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0)
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in expected]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        torch.manual_seed(seed)
        losses = F.binary_cross_entropy_with_logits(call(model, batch), target, reduction="none").mean(0)
        calls.clear()
        gramian = engine.compute_gramian(losses)
        torch.testing.assert_close(gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-14)
        assert len(calls) == 4 * 3 * (1 + len(losses))  # once in each backward pass: one in all, and one for each loss


@pytest.mark.parametrize("larger", [{"num_layers": 24}, {"num_nodes": 4_000}])
def test_memory_of_a_step_depends_neither_on_depth_nor_on_the_graph(larger):
    def peak(num_layers: int = 6, num_nodes: int = 800) -> int:
        ring = torch.arange(num_nodes)
        data = to_adj_t(Data(x=torch.randn(num_nodes, 4), edge_index=torch.stack([ring, ring.roll(1)])))
        data.node_order = ring
        torch.manual_seed(0)
        model = RevGNN(4, 64, 3, num_layers, num_nodes=num_nodes)
        (batch, *_) = SubgraphLoader(data, torch.arange(0, num_nodes + 1, 200), log=False)
        with pytest.warns(UserWarning, match="not filled"):
            call(model, batch).sum().backward()
        with peak_memory() as memory:
            call(model, batch).sum().backward()
        return memory.peak_bytes

    assert peak(**larger) < 1.1 * peak()


def test_weights_of_edges_are_given_where_they_are_named():
    data, ptr = make_graph()
    data.adj_t = normalize(data.adj_t)
    options = {"conv": "gcn", "conv_kwargs": {"normalize": False, "add_self_loops": False}}
    with pytest.raises(ValueError, match="weights other than 1"):
        make_model(**options)(data.x, data.adj_t)
    model = make_model(**options, inputs=("edge_weight",)).eval()
    true = model(data.x, data.adj_t)
    for batch in SubgraphLoader(data, ptr):
        close([call(model, batch)], [true[batch.n_id[: batch.batch_size]]])


def test_what_is_refused():
    with pytest.raises(ValueError, match="degrees of neighbours"):
        make_model(conv="gcn")
    with pytest.raises(TypeError, match=r"history_dtype: .* need num_nodes="):
        make_model(num_nodes=None, history_dtype=torch.int8)
    with pytest.raises(ValueError, match="recompute=True"):
        make_model(recompute=True)
    data, _ = make_graph()
    with pytest.raises(ValueError, match=r"missing: edge_attr"):
        make_model(inputs=("edge_attr",))(data.x, data.adj_t)


def test_the_edges_of_an_adjacency_are_made_once_and_not_kept_longer():
    adj_t = make_graph()[0].adj_t.clone()
    with torch.inference_mode():
        first, _ = edges_of(adj_t, (), {})
    assert edges_of(adj_t, (), {})[0] is first
    expected = first.clone()
    first.zero_()  # a block that writes into it
    again = edges_of(adj_t, (), {})[0]
    assert again is not first
    assert torch.equal(again, expected)
    gone = weakref.ref(again)
    del adj_t, again
    gc.collect()
    assert gone() is None


def test_an_adjacency_that_is_changed_in_place_has_other_edges():
    data, _ = make_graph()
    model, plain = make_model(), make_model(num_nodes=None, disable=True)
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        found, wanted = model(data.x, data.adj_t), plain(data.x, edge_index_of(data))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        data.adj_t.col_indices().copy_(data.adj_t.col_indices().add(1).remainder(NODES))
