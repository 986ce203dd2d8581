"""What convolutions make of the edges alone is made once for an `edge_index`, and all else is as they do it."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
import torch_geometric.nn as geometric
from torch import nn
from torch.testing import assert_close
from torch_geometric.nn import GATConv, GATv2Conv

from recollect.messages import convolve, for_targets
from recollect.messages._recall import asks_again
from recollect.reversible import GroupAddRev

N, CHANNELS = 12, 4


class WithFirst(nn.Module):
    """A convolution that is given the first features too."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, edge_index):
        return self.conv(x, x, edge_index)


# Each in training, and so with what it drops.
CONVS = {
    "gat, attention dropped": lambda: GATConv(CHANNELS, 2, heads=2, dropout=0.4, residual=True),
    "gat, two maps": lambda: GATConv((CHANNELS, CHANNELS), CHANNELS),
    "gatv2": lambda: GATv2Conv(CHANNELS, CHANNELS, heads=2, concat=False),
    "gatv2, attention dropped": lambda: GATv2Conv(CHANNELS, 2, heads=2, dropout=0.4, share_weights=True),
    "sgc": lambda: geometric.SGConv(CHANNELS, CHANNELS, K=2),
    "cheb": lambda: geometric.ChebConv(CHANNELS, CHANNELS, K=3),
    "cheb, random walk": lambda: geometric.ChebConv(CHANNELS, CHANNELS, K=2, normalization="rw"),
    "gcn, against the edges": lambda: geometric.GCNConv(CHANNELS, CHANNELS, flow="target_to_source"),
    "appnp, edges dropped": lambda: geometric.APPNP(2, 0.1, dropout=0.4),
    "gcn2": lambda: WithFirst(geometric.GCN2Conv(CHANNELS, 0.1)),
    "ssgc": lambda: geometric.SSGConv(CHANNELS, CHANNELS, 0.1),
}
each = pytest.mark.parametrize("name", CONVS)


def edges():
    edge_index = torch.randint(N - 1, (2, 40), generator=torch.Generator().manual_seed(0))
    edge_index[1, :3] = edge_index[0, :3]  # some of them are self-loops
    return edge_index


def features():
    return torch.randn(N, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(name):
    torch.manual_seed(0)
    return CONVS[name]().double()


def step(run, module, edge_index, seed=5):
    x = features().requires_grad_()
    torch.manual_seed(seed)
    out = run(x, edge_index)
    return out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()], allow_unused=True)


def called(module):
    return lambda *args: convolve(module, *args)


@pytest.fixture
def masked(monkeypatch):
    """What is made of self-loops, one entry each time, since the test began."""
    counted = []
    loops = sys.modules["torch_geometric.utils.loop"]

    class Counting:
        def __getattr__(self, name):
            if name == "arange":  # once for all self-loops
                counted.append(name)
            return getattr(torch, name)

    monkeypatch.setattr(loops, "torch", Counting())
    return counted


@each
def test_values_gradients_and_draws_are_the_convolutions_own(name, masked):
    module, edge_index = made(name), edges()
    expected = step(module, module, edge_index)
    found = step(called(module), module, edge_index)
    masked.clear()
    again = step(called(module), module, edge_index)
    assert masked == []
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_close(again, expected, rtol=0, atol=0)
    other = step(called(module), module, edge_index, seed=6)
    assert ("dropped" in name) == (not torch.equal(other[0], expected[0]))


@each
def test_edges_that_change_are_looked_at_again(name):
    module, edge_index = made(name), edges()
    first = step(called(module), module, edge_index)
    edge_index[:, 5:20] = edge_index[:, 5:20].flip(0)
    expected = step(module, module, edge_index)
    assert not torch.allclose(first[0], expected[0])
    assert_close(step(called(module), module, edge_index), expected, rtol=1e-12, atol=1e-12)


@each
def test_nothing_is_left_on_the_convolution_and_edges_are_let_go(name):
    module, edge_index = made(name), edges()
    before = {key: dict(vars(part)) for key, part in module.named_modules()}
    step(called(module), module, edge_index)
    assert {key: dict(vars(part)) for key, part in module.named_modules()} == before
    gone = weakref.ref(edge_index)
    del edge_index
    gc.collect()
    assert gone() is None


@each
def test_a_reversible_layer_rebuilds_what_was_dropped(name):
    module, edge_index = made(name), edges()
    convs = nn.ModuleList([module, copy.deepcopy(module)])
    found = []
    for disable in (True, False):
        rev = GroupAddRev(convs, disable=disable)
        x = torch.cat([features(), features().flip(0)], 1).requires_grad_()
        torch.manual_seed(5)
        out = rev(x, edge_index)
        value = out.detach().clone()
        found.append([value, *torch.autograd.grad(out.sin().sum(), [x, *rev.parameters()], allow_unused=True)])
    assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_other_numbers_of_nodes_and_types_are_other_questions():
    module, edge_index = geometric.SGConv(CHANNELS, CHANNELS), edges()
    for x in (features().float(), features().float()[: N - 1], torch.cat([features(), features()]).float()):
        assert_close(convolve(module, x, edge_index), module(x, edge_index))
    module.double()
    assert_close(convolve(module, features(), edge_index), module(features(), edge_index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gat, attention dropped", "gatv2"])
def test_attention_that_is_handed_out_is_made_for_each(name, masked):
    module, edge_index = made(name).eval(), edges()
    convolve(module, features(), edge_index)
    for _ in range(2):
        masked.clear()
        out, (own, _weights) = convolve(module, features(), edge_index, return_attention_weights=True)
        assert masked
        assert_close(out, module(features(), edge_index), rtol=1e-12, atol=1e-12)
        own.zero_()  # it is the caller's


def of_a_subclass():
    class Doubled(GATv2Conv):
        def message(self, x_j, alpha):
            return 2 * super().message(x_j, alpha)

    return Doubled(CHANNELS, CHANNELS)


def with_a_hook():
    conv = GATv2Conv(CHANNELS, CHANNELS)
    conv.register_message_forward_hook(lambda module, args, out: 2 * out)
    return conv


def with_a_method():
    conv = geometric.ChebConv(CHANNELS, CHANNELS, 2)
    own = conv.__norm__
    conv.__norm__ = lambda *args, **kwargs: (own(*args, **kwargs)[0], 2 * own(*args, **kwargs)[1])
    return conv


@pytest.mark.parametrize("make", [of_a_subclass, with_a_hook, with_a_method])
def test_what_is_not_surely_known_is_called_as_it_is(make, masked):
    module, edge_index = make().double(), edges()
    expected = step(module, module, edge_index)
    for _ in range(2):
        masked.clear()
        assert_close(step(called(module), module, edge_index), expected, rtol=1e-12, atol=1e-12)
        assert masked


@pytest.mark.parametrize("name", ["gatv2", "cheb"])
def test_a_function_that_was_put_in_the_place_of_another_is_asked(name, monkeypatch):
    module, edge_index = made(name), edges()
    step(called(module), module, edge_index)
    if name == "cheb":
        other = lambda self, edge_index, num_nodes, *rest, dtype, **options: (  # noqa: E731
            edge_index, edge_index.new_full((edge_index.size(1),), 3, dtype=dtype)
        )  # fmt: skip
        monkeypatch.setattr(type(module), "__norm__", other)
    else:
        file = sys.modules["torch_geometric.nn.conv.gatv2_conv"]

        @functools.wraps(file.remove_self_loops)  # which takes its names
        def first(edge_index, edge_attr):
            return edge_index[:, :9], None

        monkeypatch.setattr(file, "remove_self_loops", first)
    assert_close(step(called(module), module, edge_index), step(module, module, edge_index), rtol=1e-12, atol=1e-12)


def test_weights_and_features_of_edges_are_taken_each_time():
    edge_index = edges()
    weights = torch.rand(40, dtype=torch.float64).requires_grad_()
    for conv in (geometric.SGConv(CHANNELS, CHANNELS).double(), geometric.ChebConv(CHANNELS, CHANNELS, 3).double()):
        for edge_weight in (weights, 2 * weights.detach()):
            convolve(conv, features(), edge_index)
            found, expected = (
                convolve(conv, features(), edge_index, edge_weight),
                conv(features(), edge_index, edge_weight),
            )
            assert_close(found, expected, rtol=1e-12, atol=1e-12)
    conv, attributes = GATv2Conv(CHANNELS, CHANNELS, edge_dim=2).double(), torch.randn(40, 2, dtype=torch.float64)
    for edge_attr in (attributes, -attributes, None):
        found, expected = convolve(conv, features(), edge_index, edge_attr), conv(features(), edge_index, edge_attr)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_pairs_and_first_nodes():
    conv, x = GATv2Conv(CHANNELS, CHANNELS).double(), features()
    edge_index = torch.stack([torch.randint(N, (30,)), torch.randint(5, (30,))])
    for _ in range(2):
        found = convolve(conv, (x, x[:5]), edge_index)
        assert_close(found, conv((x, x[:5]), edge_index), rtol=1e-12, atol=1e-12)
        with for_targets(5):
            assert_close(convolve(conv, x, edge_index), found, rtol=1e-12, atol=1e-12)
        assert_close(convolve(conv, x, edge_index), conv(x, edge_index), rtol=1e-12, atol=1e-12)


def test_what_is_made_in_inference_mode_serves_backward():
    module, edge_index = made("gatv2"), edges()
    with torch.inference_mode():
        convolve(module, features(), edge_index)
    expected = step(module, module, edge_index)
    assert_close(step(called(module), module, edge_index), expected, rtol=1e-12, atol=1e-12)


def test_threads_that_share_a_convolution():
    edge_index, plain = edges(), made("gatv2")
    expected, found = plain(features(), edge_index).detach(), []

    def run(own):
        for turn in range(20):
            out = plain(features(), own) if turn % 2 else convolve(plain, features(), own)
            found.append(torch.allclose(out, expected, rtol=1e-12, atol=1e-12))

    threads = [threading.Thread(target=run, args=(edge_index,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_which_classes_ask():
    ask = {"GATConv", "GATv2Conv", "GCNConv", "SGConv", "ChebConv", "APPNP", "GCN2Conv", "SSGConv"}
    assert all(asks_again(getattr(geometric, name)) for name in ask)
    assert not any(asks_again(getattr(geometric, name)) for name in ("SAGEConv", "GINConv", "TransformerConv"))
