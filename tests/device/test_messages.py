"""Adjacencies and products with them on another device: values, gradients, waits."""

import copy

import pytest
import torch

from device.compare import assert_same, waits
from device.emulation import watch
from recollect import checkpoint, messages
from recollect._devices import FORMS
from recollect.messages import (
    adjacency_of_edges,
    check_csr,
    convolve,
    extreme,
    for_targets,
    made_of,
    make_adj_t,
    multiplied,
    naming_pairs,
    propagate,
    row_pointers,
    rows_of,
    shifted,
    sparse_csr,
    take_made,
    transposed_rows,
    values_of,
    with_weights,
)
from recollect.reversible import GroupAddRev

NODES, EDGES = 9, 25
GENERATOR = torch.Generator().manual_seed(0)
SOURCE, TARGET = torch.randint(NODES, (2, EDGES), generator=GENERATOR)
WEIGHTS = torch.rand(EDGES, dtype=torch.float64, generator=GENERATOR)
X = torch.randn(NODES, 4, dtype=torch.float64, generator=GENERATOR)


def on(place, *tensors):
    return [tensor.detach().to(place) for tensor in tensors]


def adjacency(place):
    source, target, weights = on(place, SOURCE, TARGET, WEIGHTS)
    return make_adj_t(source, target, weights, NODES)[0]


def parts_of(adj_t):
    return [adj_t.crow_indices(), adj_t.col_indices(), adj_t.values()]


def made_again(rowptr, col, value):
    return sparse_csr(rowptr, col, value, (NODES, NODES))


# What is computed of an adjacency and rows: tensors.
CASES = {
    "make_adj_t": lambda adj_t, x: parts_of(adj_t),
    "row_pointers": lambda adj_t, x: [row_pointers(rows_of(adj_t), NODES, torch.int64)],
    "rows_of": lambda adj_t, x: [rows_of(adj_t)],
    "values_of": lambda adj_t, x: [values_of(adj_t)],
    "sparse_csr": lambda adj_t, x: parts_of(made_again(*parts_of(adj_t))),
    "transposed_rows": lambda adj_t, x: parts_of(transposed_rows(adj_t, 3)),
    "shifted": lambda adj_t, x: parts_of(shifted(3, 2, x)),
    "multiplied": lambda adj_t, x: [multiplied(adj_t, x)],
    "with_weights": lambda adj_t, x: [propagate(with_weights(adj_t, x.sum() * adj_t.values()), x)],
    "propagate": lambda adj_t, x: [propagate(adj_t, x), propagate(adj_t, x, weights=adj_t.values().sin())],
    "adjacency_of_edges": lambda adj_t, x: [
        propagate(adjacency_of_edges(
            torch.stack([adj_t.col_indices(), rows_of(adj_t)]), adj_t.values(), NODES, NODES
        ), x)
    ],
}  # fmt: skip
BESIDE = {  # refused, or of a convolution, below; and what says what was given
    "Made", "check_csr", "convolve", "described", "extreme", "for_targets", "made_of", "naming_pairs", "take_made",
    "version_of",
}  # fmt: skip


WAITS = {"transposed_rows": 1, "adjacency_of_edges": 1}  # how many edges there are; whether new edges fit the nodes


def test_every_public_name_is_tried():
    assert CASES.keys() | BESIDE == set(messages.__all__)


@pytest.mark.parametrize("name", CASES)
def test_values_and_waits(other, name):
    expected = CASES[name](adjacency("cpu"), X)
    adj_t, (x,) = adjacency(other), on(other, X)
    with watch() as log:
        found = CASES[name](adj_t, x)
    assert_same(found, expected)
    assert log.syncs == WAITS.get(name, 0), log.where


@pytest.mark.parametrize("name", ["propagate", "with_weights", "adjacency_of_edges"])
def test_gradients(other, name):
    found = []
    for place in ("cpu", other):
        (x,), adj_t = on(place, X), adjacency(place)
        total = sum(each.sin().sum() for each in CASES[name](adj_t, x.requires_grad_()))
        found.append(torch.autograd.grad(total, x))
    assert_same(found[1], found[0])


def test_gradients_of_weights(other):
    found = []
    for place in ("cpu", other):
        (x, weights), adj_t = on(place, X, WEIGHTS), adjacency(place)
        total = propagate(with_weights(adj_t, weights.requires_grad_()), x).sin().sum()
        found.append(torch.autograd.grad(total, weights))
    assert_same(found[1], found[0])


def test_what_is_refused(other):
    adj_t, (x,) = adjacency(other), on(other, X)
    check_csr(adj_t)
    with pytest.raises(TypeError, match=r"layout torch\.strided"):
        check_csr(x)
    with pytest.raises(ValueError, match="on the CPU only"):
        extreme(adj_t, x, "max")


@pytest.mark.parametrize("forms", ["others", "cuda"])
def test_convolutions(other, forms, monkeypatch):
    if forms == "cuda":
        monkeypatch.setitem(FORMS, other, FORMS["cuda"])
    conv_of = pytest.importorskip("torch_geometric.nn").SAGEConv
    torch.manual_seed(0)
    conv, edge_index = conv_of(4, 3).double(), torch.stack([SOURCE, TARGET])
    expected, few = conv(X, edge_index), edge_index[:, edge_index[1] < 3]
    conv.to(other)
    x, edge_index, few = on(other, X, edge_index, few)
    with naming_pairs(edge_index):
        assert_same([convolve(conv, x, edge_index)], [expected])
    with for_targets(3):
        assert_same([convolve(conv, x, few)[:3]], [expected[:3]])
    made = made_of(edge_index)
    assert (made is not None) == (forms == "cuda")  # where a convolution is products, they are kept with the edges
    if made is not None:
        again = edge_index.clone()
        take_made(again, made)
        with watch() as log:
            found = convolve(conv, x, again)
        assert log.where == []
        assert_same([found], [expected])


class WithFirst(torch.nn.Module):
    """A convolution that is given the first features too."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, edge_index):
        return self.conv(x, x, edge_index)


# Each makes something of the edges alone, and torch_geometric's does so in each call.
ASKING = {
    "gat": lambda nn: nn.GATConv(4, 4),
    "gat, attention dropped": lambda nn: nn.GATConv(4, 2, heads=2, dropout=0.4),
    "gatv2, attention dropped": lambda nn: nn.GATv2Conv(4, 2, heads=2, dropout=0.4),
    "gcn": lambda nn: nn.GCNConv(4, 4),
    "sgc": lambda nn: nn.SGConv(4, 4, K=2),
    "cheb": lambda nn: nn.ChebConv(4, 4, K=3),
    "appnp": lambda nn: nn.APPNP(2, 0.1, dropout=0.4),
    "gcn2": lambda nn: WithFirst(nn.GCN2Conv(4, 0.1)),
    "ssgc": lambda nn: nn.SSGConv(4, 4, 0.1),
}


@pytest.mark.parametrize("forms", ["others", "cuda"])
@pytest.mark.parametrize("name", ASKING)
def test_convolutions_that_ask_for_self_loops_do_so_once(other, name, forms, monkeypatch):
    if forms == "cuda":
        monkeypatch.setitem(FORMS, other, FORMS["cuda"])
    torch.manual_seed(0)
    conv = ASKING[name](pytest.importorskip("torch_geometric.nn")).double()
    block = GroupAddRev(conv.to(other), num_groups=2)
    x, edge_index = on(other, torch.cat([X, X.flip(0)], 1), torch.stack([SOURCE, TARGET]))
    disabled = copy.deepcopy(block)
    disabled.disable = True
    calls = {
        "as it is": (conv, lambda h: convolve(conv, h[:, :4], edge_index)),
        "checkpoint": (conv, lambda h: checkpoint(lambda rows: convolve(conv, rows, edge_index), h[:, :4])),
        "reversible, disabled": (disabled, lambda h: disabled(h, edge_index)),
        "reversible": (block, lambda h: block(h, edge_index)),
    }
    found = {}
    for key, (module, call) in calls.items():

        def step(module=module, call=call):
            torch.manual_seed(5)
            rows = x.clone().requires_grad_()
            out = call(rows)
            kept = out.detach().clone()
            return kept, *torch.autograd.grad(out.sin().sum(), [rows, *module.parameters()], allow_unused=True)

        found[key] = step()
        assert waits(step) == []
    assert_same(found["checkpoint"], found["as it is"])
    assert_same(found["reversible"], found["reversible, disabled"])
