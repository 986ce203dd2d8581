"""A step over parts is the step over the whole graph."""

import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch_geometric.nn import GATConv, GCNConv, PNAConv, SAGEConv
from whole_graph_zoo import N, a_graph, plain_step, sum_of_losses, whole_step

from recollect.frames import LatticeError, RebuildError
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph

PTR = torch.tensor([0, 20, 20, 50, 61, N])


def a_model(data, conv="sage", groups=2, layers=4, **options) -> RevGNN:
    out = data.y.size(1) if data.y.dim() == 2 else 4
    return RevGNN(7, 4 * groups, out, layers, num_groups=groups, conv=conv, **options).to(data.x.dtype)


def compare(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("conv", ["sage", "gcn", "gin", "graphconv", "gat", "gen"])
def test_gradients_of_every_convolution(conv, groups):
    data = a_graph()
    options = {"conv_kwargs": {"norm": "layer"}} if conv == "gen" else {}
    model = a_model(data, conv, groups, dropout=0.3, exact=True, **options)
    compare(whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data))


@pytest.mark.parametrize("conv", ["sage", "gcn", "gin", "gat"])
@pytest.mark.parametrize("edges", ["none into a part", "none at all"])
def test_parts_without_edges(conv, edges):
    data = a_graph()
    kept = (data.edge_index >= 20).all(0) if edges == "none into a part" else torch.zeros(data.num_edges).bool()
    data.edge_index = data.edge_index[:, kept]
    model = a_model(data, conv, exact=True)
    compare(whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("exact", [False, True, 30])
@pytest.mark.parametrize("in_files", [False, True])
def test_gradients_under_all_settings(tied, shared, exact, in_files, tmp_path):
    data = a_graph(labels=3)
    model = a_model(data, tied=tied, shared_dropout=shared, exact=exact, dropout=0.0 if not shared else 0.4)
    whole = WholeGraph(model, data, PTR, tmp_path / "store" if in_files else None, exact=exact)
    compare(whole_step(whole, data), plain_step(model, data))
    assert whole.last_drift == 0.0 if exact else whole.last_drift < 1e-12
    model.eval()
    assert_close(whole.evaluate(), model(data.x, data.edge_index), rtol=1e-10, atol=1e-10)


def test_float32_comes_back_bit_for_bit_after_many_layers(tmp_path):
    data = a_graph(dtype=torch.float32)
    model = a_model(data, layers=100, dropout=0.2, exact=True)
    whole = WholeGraph(model, data, PTR, tmp_path)
    _, gradients, _ = whole_step(whole, data)
    assert whole.last_drift == 0.0
    _, expected, _ = plain_step(model, data)
    assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_edge_weights_go_with_their_edges():
    data = a_graph()
    data.edge_weight = torch.rand(data.edge_index.size(1), dtype=torch.float64)
    model = a_model(data, "gcn", exact=True)
    expected = plain_step(model, data, data.edge_weight)
    compare(whole_step(WholeGraph(model, data, PTR, inputs=("edge_weight",)), data), expected)


class Own(nn.Module):
    """A convolution of the user's own, with attention, an MLP and a residual."""

    def __init__(self, channels):
        super().__init__()
        self.conv = GATConv(channels, channels, heads=1)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x, edge_index):
        return x + self.mlp(self.conv(x, edge_index))


def test_a_convolution_of_ones_own():
    data = a_graph()
    model = a_model(data, Own, exact=True)
    compare(whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data))


class Twice(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = SAGEConv(channels, channels), SAGEConv(channels, channels)

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


class OverNodes(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = SAGEConv(channels, channels)

    def forward(self, x, edge_index):
        return self.conv(x - x.mean(0), edge_index)


@pytest.mark.parametrize("conv", [Twice, OverNodes])
def test_a_block_that_looks_further_is_refused(conv):
    data = a_graph()
    with pytest.raises(ValueError, match="more than the node and its neighbours"):
        WholeGraph(a_model(data, conv), data, PTR)


def test_a_block_that_goes_by_degrees_of_neighbours_is_told():
    data = a_graph()
    assert WholeGraph(a_model(data, lambda c: GCNConv(c, c)), data, PTR).parts[0].further
    assert not WholeGraph(a_model(data, "sage"), data, PTR).parts[0].further


def test_scalers_of_degrees():
    data = a_graph()
    degrees = torch.bincount(torch.bincount(data.edge_index[1], minlength=N))

    def conv(channels):
        return PNAConv(channels, channels, ["mean", "max"], ["identity", "amplification"], degrees)

    model = a_model(data, conv, exact=True)
    compare(whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data))


def test_what_blocks_draw_is_drawn_again():
    data = a_graph()
    whole = WholeGraph(a_model(data, dropout=0.5, shared_dropout=False, exact=True), data, PTR)
    first, second = whole_step(whole, data), whole_step(whole, data)
    compare(first, second, 0.0)
    assert whole.last_drift == 0.0
    other = whole_step(whole, data, seed=6)
    assert not torch.equal(first[0], other[0])


class Forgetful(nn.Module):
    """Computes something else every time."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.calls = SAGEConv(channels, channels), 0

    def forward(self, x, edge_index):
        self.calls += self.training
        return self.conv(x, edge_index) * (1 + 0.1 * (self.calls % 7))


def test_a_block_that_does_not_repeat_itself_is_named_and_no_gradient_is_given():
    data = a_graph()
    model = a_model(data, Forgetful, exact=True)
    with pytest.raises(RebuildError, match="layer 3, block 1"):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_added_up_and_frozen_parameters_get_none():
    data = a_graph()
    model = a_model(data, exact=True)
    model.project.requires_grad_(False)
    whole = WholeGraph(model, data, PTR)
    _, once, _ = whole_step(whole, data)
    once = {name: gradient.clone() for name, gradient in once.items()}
    whole.step(sum_of_losses(data))
    assert "project.weight" not in once
    assert model.project.weight.grad is None
    for name, gradient in once.items():
        assert_close(model.get_parameter(name).grad, 2 * gradient)


def test_values_out_of_range_are_an_error_in_the_forward_pass():
    data = a_graph(dtype=torch.float32)
    model = a_model(data, exact=22)
    with pytest.raises(LatticeError, match="exact="):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda data, model: (data, nn.Linear(7, 4), PTR), TypeError, "RevGNN"),
        (lambda data, model: (data, model, PTR[:-1]), ValueError, "ptr runs from"),
        (lambda data, model: (data.subgraph(torch.arange(10)), model, PTR), ValueError, "ptr runs from"),
        (lambda data, model: (type(data)(x=data.x, edge_index=data.edge_index), model, PTR), ValueError, "train_mask"),
    ],
)
def test_what_is_refused(change, error, message):
    data = a_graph()
    data, model, ptr = change(data, a_model(data))
    with pytest.raises(error, match=message):
        WholeGraph(model, data, ptr)


def test_batch_normalisation_is_refused_in_training_alone():
    data = a_graph()
    model = a_model(data, norm="batch", exact=True)
    whole = WholeGraph(model, data, PTR)
    with pytest.raises(ValueError, match="normalises over all nodes"):
        whole.step(sum_of_losses(data))
    model.eval()
    compare(whole_step(whole, data), plain_step(model, data))


def test_a_criterion_must_return_a_scalar():
    data = a_graph()
    with pytest.raises(ValueError, match="scalar"):
        WholeGraph(a_model(data), data, PTR).step(lambda logits, y: logits)


def test_no_node_for_training():
    data = a_graph()
    data.train_mask[:] = False
    with pytest.raises(ValueError, match="train_mask"):
        WholeGraph(a_model(data), data, PTR).step(sum_of_losses(data))


class Drawing(nn.Module):
    """Draws from Python's generator."""

    def __init__(self, channels):
        super().__init__()
        self.conv = SAGEConv(channels, channels)

    def forward(self, x, edge_index):
        return self.conv(x, edge_index) * (1 + random.random())


@pytest.mark.parametrize("conv", [Forgetful, Drawing])
def test_what_does_not_repeat_itself_is_told_from_rounding(conv, tmp_path):
    data = a_graph()
    model = a_model(data, conv, exact=False)
    with pytest.raises(RebuildError, match=r"layer 3, block 1.*rounding"):
        WholeGraph(model, data, PTR, tmp_path, exact=False).step(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conv", ["sage", "gen", "gat"])
def test_rounding_is_no_error(conv, dtype):
    data = a_graph(dtype=dtype)
    options = {"conv_kwargs": {"norm": "layer"}} if conv == "gen" else {}
    model = a_model(data, conv, layers=8, exact=False, dropout=0.2, **options)
    whole = WholeGraph(model, data, PTR, exact=False)
    loss, _, _ = whole_step(whole, data)
    assert_close(loss, plain_step(model, data)[0], rtol=1e-5, atol=1e-5)
    assert whole.last_drift > 0
