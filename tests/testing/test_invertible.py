"""`check_invertible` for every kind of module with an inverse."""

import pytest
import torch
from torch import nn

import recollect
import recollect.invertible as inn
from recollect.reversible import GroupAddRev, GroupRevRes, InvertibleModule
from recollect.testing import check_invertible

EDGES = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])


def features(channels=6):
    return torch.randn(4, channels, generator=torch.Generator().manual_seed(1))


class Conv(nn.Module):
    """Messages over the edges, scaled by an optional weight."""

    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, edge_index, weight=None):
        messages = self.dropout(self.norm(self.linear(x)))[edge_index[0]]
        return torch.zeros_like(x).index_add(0, edge_index[1], messages if weight is None else messages * weight).tanh()

    def reset_parameters(self):
        self.linear.reset_parameters()


class GraphFirst(Conv):
    def forward(self, graph, x, weight=None):
        return super().forward(x, graph, weight)


def fails(*args, match, **options):
    with pytest.raises(AssertionError, match=match):
        check_invertible(*args, **options)


def test_invertible_modules():
    assert check_invertible(inn.Identity(), features()) is True

    class Wrong(inn.Identity):
        def inverse(self, y):
            return y * 1.01

    fails(Wrong(), features(), match="Wrong: the inverse does not give back input 0")
    assert check_invertible(Wrong(), features(), rtol=0.02)
    assert check_invertible(Wrong(), features(), atol=0.2)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("extra", [(), (torch.full((5, 1), 0.5),), (torch.tensor(2.0, requires_grad=True),)])
def test_grouped_reversible_modules(groups, dropout, extra):
    torch.manual_seed(0)
    layer = GroupAddRev(Conv(6 // groups, dropout), num_groups=groups)
    assert check_invertible(layer, features(), EDGES, *extra)
    assert check_invertible(layer.eval(), features(), EDGES, *extra)
    layer.train().disable = True
    assert check_invertible(layer, features(), EDGES, *extra)
    layer = GroupRevRes(GraphFirst(6 // groups, dropout), groups=groups)
    assert check_invertible(layer, EDGES, features(), *extra)


def test_what_is_left_behind():
    layer = GroupAddRev(Conv(3, 0.5), num_groups=2)
    state, generator = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    check_invertible(layer, features(), EDGES)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not layer.disable


class Pair(InvertibleModule):
    """x -> two outputs, with arguments of any kind."""

    def __init__(self, error=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.error = error

    def _forward(self, x, factor, name):
        assert name == "pair"
        return x * self.weight * factor, x.sin()

    def _inverse(self, y, _, factor, name):
        assert name == "pair"
        return y / self.weight / factor + self.error


def test_modules_of_the_reversible_kind():
    assert check_invertible(Pair(), features(), 2.0, "pair")
    assert check_invertible(Pair(), features(), torch.tensor(2.0), "pair")
    fails(Pair(0.1), features(), 2.0, "pair", match="Pair: the inverse does not give back input 0")


def test_groups_with_a_wrong_block():
    class Unrepeatable(Conv):
        def forward(self, x, edge_index):
            return super().forward(x, edge_index) * (2.0 if recollect.in_backward() else 1.0)

    fails(GroupAddRev(Unrepeatable(3), num_groups=2), features(), EDGES, match="GroupAddRev: the inverse does not")


class Shift(nn.Module):
    """An ordinary module with an inverse."""

    def __init__(self, error=0.0, hidden=False):
        super().__init__()
        self.by = nn.Parameter(torch.ones(6))
        self.error, self.hidden = error, hidden

    def forward(self, x):
        if self.hidden:  # a checkpoint of the module's own, with a wrong inverse
            return recollect.checkpoint(lambda x: x * self.by.exp(), x * 1.0, inverse=lambda y: y)
        return x * self.by.exp()

    def inverse(self, y):
        return y * (-self.by).exp() + self.error


def test_ordinary_modules():
    assert check_invertible(Shift(), features())
    assert check_invertible(Shift().eval(), features())
    fails(Shift(0.1), features(), match="Shift: the inverse does not give back input 0")
    message = "in double precision it does"
    fails(Shift(), features(), rtol=0.0, atol=1e-9, match=message)


def test_frames_inside_do_not_vouch_for_themselves():
    class Hidden(Shift):
        pass

    fails(Hidden(hidden=True), features(), match=r"Hidden: there are no gradients.*lambda.*differs from the forward")


@pytest.mark.parametrize("thing", [nn.Linear(6, 6), nn.Sequential(), torch.sin, "module"])
def test_others_are_refused(thing):
    with pytest.raises(TypeError, match=r"check_invertible takes a module with an inverse.*\(got "):
        check_invertible(thing, features())
