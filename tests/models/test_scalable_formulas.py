"""What each model computes, written out with dense matrices, or with torch_geometric's layers."""

from __future__ import annotations

import math

import pytest
import torch
from model_zoo import AGGREGATORS, IN, NODES, OUT, SCALERS, data_for, make, make_graph
from torch.nn import functional as F

from recollect.autoscale import edge_index_of, propagate, with_weights
from recollect.messages import sparse_csr
from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA, PNA_JK
from recollect.models._aggregate import Messages
from recollect.models._dropout import dropout
from recollect.models._layers import GCNLayer

geometric = pytest.importorskip("torch_geometric.nn")


def check(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_gcn():
    model = make("gcn-widths").eval()
    data = data_for(model)
    x, edges = data.x, edge_index_of(data.adj_t)
    for layer, conv in enumerate(model.convs):
        peer = geometric.GCNConv(*conv.weight.shape, normalize=False).double()
        peer.lin.weight.data = conv.weight.data.t()
        peer.bias.data = conv.bias.data.uniform_()
        x = peer(x, edges, data.adj_t.values())
        x = x.relu() if layer < 2 else x
    check(model(data.x, data.adj_t), x)


@pytest.mark.parametrize("widths", [(3, 7), (7, 3)])
def test_gcn_propagates_whichever_side_has_fewer_channels(widths, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "recollect.models._layers.propagate", lambda adj_t, x: seen.append(x.size(1)) or propagate(adj_t, x)
    )
    out = GCNLayer(*widths)(torch.randn(NODES, widths[0]), make_graph().adj_t.to(torch.float32))
    assert out.shape == (NODES, widths[1])
    assert seen == [3]


def test_gcn_with_everything():
    """linear, batch norm, residual; dropout by its random draws, in this order."""
    model = make("gcn-all", dropout=0.4)
    data = data_for(model)
    dense = data.adj_t.to_dense()

    def drop(x):
        return dropout(x, 0.4)

    torch.manual_seed(2)
    x = drop(F.linear(drop(data.x), model.lins[0].weight, model.lins[0].bias).relu())
    for conv, bn in zip(model.convs, model.bns, strict=True):
        h = dense @ x @ conv.weight + conv.bias
        h = F.batch_norm(h, None, None, bn.weight, bn.bias, training=True)
        x = drop((h + x).relu())
    expected = F.linear(x, model.lins[1].weight, model.lins[1].bias)
    torch.manual_seed(2)
    check(model(data.x, data.adj_t), expected)


def test_gat():
    model = make("gat").eval()
    data = data_for(model)
    x, edges = data.x, make_graph().adj_t
    edges = edge_index_of(edges)
    for layer, conv in enumerate(model.convs):
        heads, width = (3, OUT) if layer == 2 else (2, 6)
        peer = geometric.GATConv(x.size(1), width, heads, concat=layer < 2).double()  # adds self-loops itself
        peer.load_state_dict(conv.state_dict())
        x = peer(x, edges)
        x = F.elu(x) if layer < 2 else x
    check(model(data.x, data.adj_t), x)


def test_gat_drops_inputs_and_attention():
    model = make("gat", dropout=0.3)
    data = data_for(model)
    torch.manual_seed(3)
    found = model(data.x, data.adj_t)
    options = {"dropout": 0.3, "add_self_loops": False}
    peers = [
        geometric.GATConv(5, 6, 2, **options),
        geometric.GATConv(12, 6, 2, **options),
        geometric.GATConv(12, OUT, 3, concat=False, **options),
    ]
    for peer, conv in zip(peers, model.convs, strict=True):
        peer.double().load_state_dict(conv.state_dict())
    torch.manual_seed(3)
    x = data.x
    for peer in peers:
        x = peer(dropout(x, 0.3), edge_index_of(data.adj_t))
        x = x if peer is peers[-1] else F.elu(x)
    check(found, x)


@pytest.mark.parametrize("name", ["gcn2", "gcn2-all"])
def test_gcn2(name):
    model = make(name, alpha=0.3, theta=0.7, batch_norm=False, residual=False).eval()
    data = data_for(model)
    edges = edge_index_of(data.adj_t)
    x = x_0 = model.lins[0](data.x).relu()
    for layer, conv in enumerate(model.convs):
        peer = geometric.GCN2Conv(6, 0.3, 0.7, layer + 1, shared_weights=name == "gcn2", normalize=False).double()
        peer.load_state_dict(conv.state_dict())
        x = peer(x, x_0, edges, data.adj_t.values()).relu()
    check(model(data.x, data.adj_t), model.lins[1](x))


def test_gcn2s_x_0_is_before_dropout():
    model = make("gcn2", num_layers=1, dropout=0.5, drop_input=False)
    data = data_for(model)
    dense = data.adj_t.to_dense()
    torch.manual_seed(0)
    x_0 = model.lins[0](data.x).relu()
    h = 0.9 * dense @ dropout(x_0, 0.5) + 0.1 * x_0
    beta = math.log(0.5 + 1)
    h = ((1 - beta) * h + beta * h @ model.convs[0].weight1).relu()
    expected = model.lins[1](dropout(h, 0.5))
    torch.manual_seed(0)
    check(model(data.x, data.adj_t), expected)


def test_appnp():
    model = make("appnp")
    data = data_for(model)
    expected = model.lins[1](model.lins[0](data.x).relu())
    peer = geometric.APPNP(K=5, alpha=0.2, normalize=False)
    check(model(data.x, data.adj_t), peer(expected, edge_index_of(data.adj_t), data.adj_t.values()))


def test_gin():
    model = make("gin").eval()
    data = data_for(model)
    x = model.lins[0](data.x).relu()
    for k, conv in enumerate(model.convs):
        conv.eps.data.fill_(0.125 * k - 0.25)
        peer = geometric.GINConv(conv.mlp, eps=conv.eps.item())
        x = peer(x, edge_index_of(data.adj_t)).relu()
    check(model(data.x, data.adj_t), model.lins[1](x))


def by_hand(kind, messages):
    """Aggregate a list of vectors."""
    if not messages:
        return torch.full((6,), math.sqrt(1e-5) if kind == "std" else 0.0, dtype=torch.float64)
    every = torch.stack(messages)
    if kind in ("max", "min"):
        return getattr(every, kind)(0).values
    if kind in ("sum", "mean"):
        return getattr(every, kind)(0)
    variance = every.var(0, correction=0)
    return variance if kind == "var" else (variance + 1e-5).sqrt()


@pytest.mark.parametrize("edge_dim", [None, 2])
@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_pna_layer(aggregator, scaler, edge_dim):
    """By a loop over nodes and edges, with weights that are not all ones."""
    model = make("pna", aggregators=[aggregator], scalers=[scaler], edge_dim=edge_dim)
    data = data_for(model)
    (conv, *_) = model.convs
    data.adj_t = with_weights(data.adj_t, torch.rand(data.adj_t.values().numel(), dtype=torch.float64) + 0.5)
    rowptr, col, weight = (
        t.tolist() for t in (data.adj_t.crow_indices(), data.adj_t.col_indices(), data.adj_t.values())
    )
    degrees = data.adj_t.crow_indices().diff().double()
    mean, log = degrees.mean(), (degrees + 1).log().mean()
    rows = []
    for i in range(NODES):
        messages = []
        for k in range(rowptr[i], rowptr[i + 1]):
            message = conv.pre_lins[0](data.x[col[k]])
            if edge_dim:
                message = message + conv.edge_lins[0].weight @ data.edge_attr[k]
            messages.append(message.relu() * weight[k])
        d = degrees[i]
        scale = {
            "identity": 1.0,
            "amplification": (d + 1).log() / log,
            "attenuation": log / (d.clamp(min=1) + 1).log(),
            "linear": d / mean,
            "inverse_linear": mean / d.clamp(min=1),
        }[scaler]
        rows.append(conv.lin(data.x[i]) + conv.post_lins[0](by_hand(aggregator, messages)) * scale)
    found = conv(data.x, data.adj_t, data.edge_attr if edge_dim else None)
    check(found, torch.stack(rows))
    found = torch.autograd.grad(found.sin().sum(), list(conv.parameters()))
    expected = torch.autograd.grad(torch.stack(rows).sin().sum(), list(conv.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("which", ["max", "min"])
def test_equal_messages_share_a_gradient_of_any_sign_evenly(which):
    rowptr, col = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 1, 2, 2, 2])
    adj_t = sparse_csr(rowptr, col, torch.ones(5).double(), (3, 3))
    x = torch.tensor(
        [[1.0, -1.0], [1.0, 2.0], [0.0, 2.0]] if which == "max" else [[1.0, 2.0], [1.0, -1.0], [3.0, -1.0]]
    )
    x = x.double().requires_grad_()
    out = getattr(Messages(x, adj_t), which)()
    seeds = torch.tensor([[[1.0, -2.0], [5.0, 5.0], [3.0, -4.0]], [[-1.0, 2.0], [5.0, 5.0], [0.0, 4.0]]]).double()
    found = [torch.autograd.grad(out, x, seed, retain_graph=True)[0] for seed in seeds]
    both = [[seed[0, 0] / 2, seed[0, 0] / 2, seed[2, 0]] for seed in seeds]
    other = [[0.0, seed[0, 1] / 2, seed[0, 1] / 2 + seed[2, 1]] for seed in seeds]
    expected = torch.stack([torch.tensor(both), torch.tensor(other)], -1).double()
    torch.testing.assert_close(torch.stack(found), expected)
    (batched,) = torch.autograd.grad(out, x, seeds, is_grads_batched=True)
    torch.testing.assert_close(batched, expected)
    assert torch.autograd.gradgradcheck(
        lambda x: getattr(Messages(x, adj_t), which)() ** 2, (torch.randn(3, 2).double().requires_grad_(),)
    )


def test_pna_sums_over_all_pairs_of_aggregators_and_scalers():
    pairs = {"aggregators": ["max", "mean"], "scalers": ["identity", "linear"]}
    model = make("pna", **pairs, num_layers=1)
    data = data_for(model)
    (conv,) = model.convs
    expected = conv.lin(data.x)
    for index, (aggregator, scaler) in enumerate(conv.pairs):
        one = make("pna", aggregators=[aggregator], scalers=[scaler], num_layers=1).convs[0]
        for name in ("pre_lins", "post_lins"):
            getattr(one, name)[0].load_state_dict(getattr(conv, name)[index].state_dict())
        expected = expected + one(data.x, data.adj_t) - one.lin(data.x)
    check(model(data.x, data.adj_t), expected)


def test_pna_jk_sees_all_layers():
    model = make("pna-jk").eval()
    data = data_for(model)
    layers = [model.lins[0](data.x)]
    for conv in model.convs:
        layers.append(conv(layers[-1], data.adj_t).relu())
    check(model(data.x, data.adj_t), model.lins[1](torch.cat(layers, -1)))


@pytest.mark.parametrize("name", ["gcn-all", "gcn-bare-all", "gat-all", "pna-scalers", "gin-all", "gcn2-all"])
@pytest.mark.parametrize("option", ["residual", "batch_norm"])
def test_options_do_something(name, option):
    one = make(name)
    other = make(name, **{option: False})
    data = data_for(one)
    assert not torch.allclose(one(data.x, data.adj_t), other(data.x, data.adj_t), atol=1e-3)


@pytest.mark.parametrize("name", ["gcn", "gcn2", "pna", "pna-jk", "gin-all"])
def test_drop_input(name):
    data = data_for(make(name))
    for drop, same in ((True, False), (False, True)):
        model = make(name, dropout=0.9, drop_input=drop, num_layers=1)
        if model.lins:
            seen: list = []
            model.lins[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            model(data.x, data.adj_t)
            assert torch.equal(seen[0], data.x) == same
        else:
            torch.manual_seed(0)
            first = model(data.x, data.adj_t)
            assert torch.equal(first, model(data.x, data.adj_t)) == same


@pytest.mark.parametrize(
    ("name", "regularised", "other"),
    [
        ("gcn", ["convs.0", "convs.1"], ["convs.2"]),
        ("gcn-all", ["convs", "bns"], ["lins"]),
        ("gcn-bare-all", ["convs.0", "convs.1", "bns"], ["convs.2"]),
        ("gat", ["convs"], []),
        ("gat-all", ["convs", "bns"], []),
        ("gcn2", ["convs"], ["lins"]),
        ("appnp", ["lins.0"], ["lins.1"]),
        ("pna", ["convs.0", "convs.1"], ["convs.2"]),
        ("pna-scalers", ["convs.0", "convs.1", "bns"], ["convs.2"]),
        ("pna-jk-all", ["convs", "bns"], ["lins"]),
        ("gin-all", ["convs", "bns"], ["lins"]),
    ],
)
def test_groups_of_weight_decay(name, regularised, other):
    model = make(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for modules, expected in ((model.reg_modules, regularised), (model.nonreg_modules, other)):
        found = {names[id(parameter)] for parameter in modules.parameters()}
        assert found == {n for n in names.values() if any(n.startswith(prefix + ".") for prefix in expected)}
    both = [*model.reg_modules.parameters(), *model.nonreg_modules.parameters()]
    assert len(both) == len(set(names.values())) == len(list(model.parameters()))
    assert not any("reg_modules" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["gcn-all", "gat-all", "gcn2-all", "appnp", "pna-scalers", "pna-jk-all", "gin-all"])
def test_reset_parameters(name):
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for history in model.histories:
        history.push(torch.ones(NODES, history.embedding_dim))
    model.reset_parameters()
    assert not any((parameter == 7.0).any() for parameter in model.parameters())
    assert not any(history.pull().any() for history in model.histories)
    assert all((buffer == 0).all() for key, buffer in model.named_buffers() if key.endswith("running_mean"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GCN(9, IN, 4, OUT, 2, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: APPNP(9, IN, 4, OUT, 2, dropout=-0.1), r"dropout must be in \[0, 1\)"),
        (lambda: GCN(9, IN, [4, 4], OUT, 3, linear=True), "between two linear maps all layers have the same width"),
        (lambda: GCN(9, IN, [4], OUT, 3), "one number for each is expected"),
        (lambda: GIN(9, IN, 4, OUT, 2, noise=-1.0), "noise must not be negative"),
        (lambda: PNA(9, IN, 4, OUT, 2, ["median"], ["identity"], torch.ones(9)), r"aggregators=\['median'\]: choose"),
        (lambda: PNA(9, IN, 4, OUT, 2, ["mean"], ["double"], torch.ones(9)), r"scalers=\['double'\]: choose"),
        (lambda: PNA(9, IN, 4, OUT, 2, [], ["identity"], torch.ones(9)), r"aggregators=\[\]: choose"),
        (lambda: PNA(9, IN, 4, OUT, 2, "mean", ["identity"], torch.ones(9)), "as a list"),
        (lambda: PNA(9, IN, 4, OUT, 2, ["mean"], ["linear"], torch.zeros(9)), "deg must hold the in-degree of every"),
        (
            lambda: PNA(9, IN, 4, OUT, 2, ["mean"], ["linear"], torch.ones(5, 1)),
            r"deg has shape \[5, 1\], but must be \[nodes\]",
        ),
        (lambda: PNA_JK(9, IN, [4], OUT, 2, ["mean"], ["linear"], torch.ones(9)), "have the same width"),
        (lambda: GCN2(9, IN, 4, OUT, 2, theta=-1.0), "theta must be above 0"),
        (lambda: GAT(9, IN, 0, 8, OUT, 1, 2), r"hidden_channels must be at least 1 \(got 0\)"),
        (lambda: GAT(9, IN, 4, 0, OUT), r"hidden_heads must be at least 1 \(got 0\)"),
        (lambda: GCN(9, 0, 4, OUT, 2), r"in_channels must be at least 1 \(got 0\)"),
        (lambda: APPNP(9, IN, 4, "3", 2), r"out_channels must be an integer of at least 1 \(got '3'\)"),
        (lambda: GCN2(9, IN, 4, OUT, 2, alpha=1.5), r"alpha must be in"),
        (lambda: APPNP(9, IN, 4, OUT, 2, alpha=-0.5), r"alpha must be in"),
    ],
)
def test_what_is_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("name", "given"), [("pna-edges", False), ("pna", True)])
def test_edge_attributes_go_with_edge_dim(name, given):
    model = make(name)
    data = make_graph()
    with pytest.raises(ValueError, match="edge_attr goes with edge_dim"):
        model(data.x, data.adj_t, **({"edge_attr": data.edge_attr} if given else {}))
