"""Buffers that layers write in training: once a step, and the step is that of the network itself."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch_geometric.nn import SAGEConv
from whole_graph_zoo import N, a_graph, losses_by_label, plain_jacobian, plain_step, sum_of_losses, whole_step

from recollect.aggregation import UPGradWeighting
from recollect.autoscale import normalize, to_adj_t
from recollect.models import GCN, RevGNN
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

PTR = torch.tensor([0, 13, 60, N])


def spectral(module: nn.Module, old: bool = False) -> nn.Module:
    """Power iterations for all linear layers."""
    norm = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    for child in module.modules():
        if isinstance(child, nn.Linear):
            norm(child)
    return module


class Conv(SAGEConv):
    """Whose weights are normalised, and whose plain form is that of a layer of linear maps."""

    def __init__(self, channels, old=False):
        super().__init__(channels, channels)
        self.out = nn.Sequential(spectral(nn.Linear(channels, channels), old), nn.Tanh())

    def forward(self, x, edge_index):
        return self.out(super().forward(x, edge_index))


def a_model(data, old=False, tied=False, around=True):
    out = data.y.size(1) if data.y.dim() == 2 else 4
    model = RevGNN(7, 8, out, 3, 2, lambda channels: Conv(channels, old), dropout=0.3, tied=tied, exact=True)
    if around:
        spectral(model.project), spectral(model.head)
    return model.to(data.x.dtype)


def buffers_of(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("old", "tied"), [(False, False), (False, True), (True, False)])
def test_power_iterations_go_on_once_a_step(old, tied, exact):
    data = a_graph()
    model = a_model(data, old, tied, around=not old)
    for layer in model.layers:
        layer.exact = exact
    whole = WholeGraph(model, data, PTR, exact=exact)
    before = buffers_of(model)
    for seed in (5, 6):
        twin = a_model(data, old, tied, around=not old)
        twin.load_state_dict(model.state_dict())
        expected = plain_step(twin, data, seed=seed)
        found = whole_step(whole, data, seed)
        assert_close(found, expected, rtol=1e-10, atol=1e-10)
        after = buffers_of(model)
        assert_close(after, buffers_of(twin), rtol=0, atol=0)
        assert all(not torch.equal(after[name], value) for name, value in before.items() if value.numel() > 1)
        before = after
    whole.evaluate()
    assert_close(buffers_of(model), before, rtol=0, atol=0)


def test_both_sweeps_of_several_losses_have_the_same_weights():
    data = a_graph(labels=3)
    model = a_model(data)
    whole, twin = WholeGraph(model, data, PTR, row_bytes=1), copy.deepcopy(model)
    _, jacobian, rows, _ = plain_jacobian(twin, data)
    torch.manual_seed(5)
    whole.step(losses_by_label(data), UPGradWeighting())
    assert_close(whole.last_gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, torch.tensordot(whole.last_weights, rows[name], 1), rtol=1e-10, atol=1e-10)
    assert_close(buffers_of(model), buffers_of(twin), rtol=0, atol=0)


@pytest.mark.parametrize("keep_every", [1, 2])
def test_networks_that_are_written_layer_by_layer(keep_every):
    data = to_adj_t(a_graph())
    data.adj_t = normalize(data.adj_t)
    model = GCN(N, 7, 6, 4, 4, dropout=0.0).double()
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 2:
            parametrizations.spectral_norm(module)
    assert buffers_of(model)
    whole, twin = WholeGraph(model, data, PTR, keep_every=keep_every), copy.deepcopy(model)
    loss = whole.step(sum_of_losses(data))
    true = sum_of_losses(data)(twin(data.x, data.adj_t)[data.train_mask], data.y[data.train_mask])
    true.backward()
    assert_close(loss, true.detach(), rtol=1e-10, atol=1e-10)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert_close(buffers_of(model), buffers_of(twin), rtol=0, atol=0)


def test_an_error_puts_them_back():
    data = a_graph()
    model = a_model(data)
    whole, before = WholeGraph(model, data, PTR), buffers_of(model)

    def criterion(logits, y):
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        whole.step(criterion)
    assert_close(buffers_of(model), before, rtol=0, atol=0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [5, 24, 40])
def test_a_step_whose_process_ended_goes_on(at, tmp_path, monkeypatch):
    def a_whole(path):
        torch.manual_seed(1)
        data = a_graph(dtype=torch.float32)
        return WholeGraph(a_model(data), data, PTR, path, memory=0), data

    whole, data = a_whole(tmp_path / "whole")
    loss, gradients, _ = whole_step(whole, data)
    broken, data = a_whole(tmp_path / "broken")
    applied, apply = [0], Tables.apply

    def stop(self, *args, **options):
        applied[0] += 1
        if applied[0] == at:
            raise Killed
        apply(self, *args, **options)

    monkeypatch.setattr(Tables, "apply", stop)
    with pytest.raises(Killed) as caught:
        whole_step(broken, data)
    monkeypatch.undo()
    caught.value.__traceback__ = None  # which holds the files open
    del caught, broken
    gc.collect()
    again, data = a_whole(tmp_path / "broken")
    assert torch.equal(again.resume(sum_of_losses(data)), loss)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
    assert_close(buffers_of(again.model), buffers_of(whole.model), rtol=0, atol=0)


class Counting(nn.Module):
    """Counts its calls in a buffer, in evaluation too."""

    def __init__(self, channels):
        super().__init__()
        self.conv = SAGEConv(channels, channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, edge_index):
        self.calls += 1
        return self.conv(x, edge_index) * (1 + self.calls)


def test_calls_are_those_of_the_network_itself():
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, 2, Counting, exact=True).double()
    whole, twin = WholeGraph(model, data, PTR), copy.deepcopy(model)
    assert_close(whole_step(whole, data), plain_step(twin, data), rtol=1e-10, atol=1e-10)
    expected = twin.eval()(data.x, data.edge_index)
    assert_close(whole.evaluate(), expected.detach(), rtol=1e-10, atol=1e-10)
    assert {int(value) for value in buffers_of(model).values()} == {2}


class Averaging(SAGEConv):
    """Keeps a mean of what it sees."""

    def __init__(self, channels):
        super().__init__(channels, channels)
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x, edge_index):
        if self.training:
            self.mean.copy_(x.detach().mean(0))
        return super().forward(x, edge_index)


def test_what_depends_on_the_rows_is_refused_in_training():
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, 2, Averaging, exact=True).double()
    whole = WholeGraph(model, data, PTR)
    with pytest.raises(ValueError, match=r"buffer conv\.mean what depends on the rows"):
        whole.step(sum_of_losses(data))
    model.eval()
    assert_close(whole_step(whole, data)[0], plain_step(model, data)[0], rtol=1e-10, atol=1e-10)
