"""Gradients of whatever a step reaches are those of autograd, and hooks on parameters see the whole of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch_geometric.nn import SAGEConv
from whole_graph_zoo import N, a_graph, plain_step, sum_of_losses, whole_step

from recollect.aggregation import SumWeighting
from recollect.autoscale import to_adj_t
from recollect.models import GIN, RevGNN
from recollect.outofcore import WholeGraph

PTR = torch.tensor([0, 20, 20, 50, 61, N])
SHARED: dict[str, torch.Tensor] = {}


def a_model(kind=RevGNN, **options) -> RevGNN:
    return kind(7, 8, 4, 3, exact=True, **options).double()


class Tempered(nn.Module):
    """A criterion with parameters of its own; ``several`` losses, or one."""

    def __init__(self, data, several=False):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.head = nn.Linear(4, 4).double()
        self.number, self.several = int(data.train_mask.sum()), several

    def forward(self, logits, y):
        each = F.cross_entropy(self.head(logits) * self.temperature, y, reduction="none") / self.number
        return torch.stack([each[y == c].sum() for c in range(4)]) if self.several else each.sum()


def plain(model, data, criterion):
    """Losses, and their Jacobian by parameter, of all that there is."""
    model.disable = True
    losses = criterion(
        model(data.x, data.adj_t if "adj_t" in data else data.edge_index)[data.train_mask], data.y[data.train_mask]
    ).reshape(-1)
    parameters = list({id(p): p for p in (*model.parameters(), *criterion.parameters())}.values())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    model.disable = False
    return losses, parameters, rows


def check_step(model, data, criterion, store=None):
    """Compare ``.grad`` of all parameters after a step."""
    _, parameters, (expected,) = plain(model, data, criterion)
    WholeGraph(model, data, PTR, store).step(criterion)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def check_several(model, data, criterion):
    """Compare the Gramian, and the gradient of the sum."""
    losses, parameters, rows = plain(model, data, criterion)
    jacobian = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows])
    whole = WholeGraph(model, data, PTR)
    assert_close(whole.step(criterion, SumWeighting()), losses.detach(), rtol=1e-10, atol=1e-12)
    assert_close(whole.last_gramian, jacobian @ jacobian.T, rtol=1e-9, atol=1e-12)
    for parameter, *gradients in zip(parameters, *rows, strict=True):
        assert_close(parameter.grad, sum(gradients), rtol=1e-9, atol=1e-12)


def test_parameters_of_a_criterion(tmp_path):
    data = a_graph()
    check_step(a_model(), data, Tempered(data), tmp_path)


def test_parameters_of_a_criterion_with_several_losses():
    data = a_graph()
    check_several(a_model(), data, Tempered(data, several=True))


class Outer(nn.Module):
    """Uses a parameter that is none of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv = SAGEConv(channels, channels)

    def forward(self, x, edge_index):
        return self.conv(x, edge_index) * SHARED["scale"]


class Owner(RevGNN):
    """Has the parameter, and does not use it itself."""

    def __init__(self, *args, **options):
        super().__init__(*args, conv=Outer, **options)
        self.scale = nn.Parameter(torch.ones(4))


class Crossing(RevGNN):
    """The features' way in, and the way out, use a parameter of a layer."""

    def embed(self, x):
        return super().embed(x) * self.layers[2].convs[0].conv.lin_l.weight.sum().sigmoid()

    def classify(self, x, mask=None):
        return super().classify(x * self.layers[1].convs[1].conv.lin_l.bias.repeat(2), mask)


def test_parameters_that_are_used_from_outside(tmp_path):
    data = a_graph()
    model = a_model(Owner)
    SHARED["scale"] = model.scale
    check_step(model, data, Tempered(data), tmp_path)
    assert model.scale.grad is not None
    model.zero_grad()
    check_several(model, data, Tempered(data, several=True))
    model = a_model(Crossing)
    check_step(model, data, Tempered(data))
    model.zero_grad()
    check_several(model, data, Tempered(data, several=True))


def test_parameters_of_a_layer_that_another_uses_from_outside():
    data = a_graph()
    model = a_model(conv=Outer)
    SHARED["scale"] = model.layers[1].convs[0].conv.conv.lin_l.bias
    check_step(model, data, Tempered(data))
    model.zero_grad()
    check_several(model, data, Tempered(data, several=True))


@pytest.mark.parametrize("several", [False, True])
def test_networks_with_a_table_for_each_layer(several):
    data = to_adj_t(a_graph())
    model = GIN(N, 7, 6, 4, num_layers=3).double()
    model.eval()
    (check_several if several else check_step)(model, data, Tempered(data, several))


def test_hooks_on_parameters_see_the_whole_gradient_once():
    data = a_graph()
    model, seen, done = a_model(), [], []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(1) or gradient.clamp(-1e-3, 1e-3))
        parameter.register_post_accumulate_grad_hook(lambda p: done.append(p.grad.clone()))
    expected = plain_step(model, data)
    number = len(list(model.parameters()))
    assert len(seen) == len(done) == number
    whole = WholeGraph(model, data, PTR)
    found = whole_step(whole, data)
    assert_close(found[:2], expected[:2], rtol=1e-9, atol=1e-12)
    assert len(seen) == len(done) == 2 * number
    whole.compute_gramian(lambda logits, y: sum_of_losses(data)(logits, y)[None])
    assert len(seen) == len(done) == 2 * number


def test_an_optimizer_that_steps_in_backward():
    data = a_graph()
    model = a_model()
    expected = {name: model.get_parameter(name) - 0.1 * g for name, g in plain_step(model, data)[1].items()}
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(p, optimizer=optimizer):
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    WholeGraph(model, data, PTR).step(sum_of_losses(data))
    for name, value in expected.items():
        assert_close(model.get_parameter(name), value, rtol=1e-9, atol=1e-12)


def test_a_step_that_cannot_be_gone_on_with(tmp_path):
    data = a_graph()
    model, criterion, calls = a_model(), Tempered(data), []

    def broken(logits, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("ended")
        return criterion(logits, y)

    whole = WholeGraph(model, data, PTR, tmp_path)
    with pytest.raises(KeyError):
        whole.step(broken)
    with pytest.raises(RuntimeError, match=r"not the network's.*remove step\.pt"):
        whole.resume(criterion)
    assert all(p.grad is None for p in (*model.parameters(), *criterion.parameters()))
