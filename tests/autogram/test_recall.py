"""What was seen of a batch in one call is believed in the next only as far as it must still hold."""

import pytest
import torch
from autogram_zoo import explicit_gramian, relative_error
from torch import nn
from torch.nn import functional as F

from recollect.autogram import Engine, _recall


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x, between=lambda h: h):
        return self.last(between(self.first(x).tanh())).square().sum(-1)


@pytest.fixture
def probes(monkeypatch):
    """How often the batch is looked for."""
    calls = []
    original = _recall.probe
    monkeypatch.setattr(_recall, "probe", lambda *args: calls.append(1) or original(*args))
    return calls


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def assert_right(engine, net, losses):
    expected = explicit_gramian(losses, list(net.parameters()))
    assert relative_error(engine.compute_gramian(losses), expected) <= 1e-10


def ways(net, order):
    """Losses of a batch that is moved to this order on the way, and back."""
    x, back, wide = draw(4, 3), order.argsort(), order[:, None].expand(4, 4)
    zeros, weight = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[order]

    def put(h):
        z = zeros.clone()
        z[order] = h
        return z

    return {
        "index": lambda: net(x, lambda h: h[order])[back],
        "index_select": lambda: net(x, lambda h: h.index_select(0, order)).index_select(0, back),
        "gather": lambda: net(x, lambda h: h.gather(0, wide)).gather(0, back),
        "take": lambda: net(x).take(order),
        "embedding": lambda: net(x, lambda h: F.embedding(order, h))[back],
        "index_copy": lambda: net(x, lambda h: zeros.index_copy(0, order, h))[order],
        "index_add": lambda: net(x, lambda h: zeros.index_add(0, order, h))[order],
        "index_put": lambda: net(x, put)[order],
        "scatter": lambda: net(x, lambda h: zeros.scatter(0, wide, h))[order],
        "sort": lambda: net(x[back]).sort()[0],
        "losses": lambda: net(x)[order],
        "roll": lambda: net(x, lambda h: h.roll(int(order[0]), 0)),
        "product": lambda: weight.T @ net(x, lambda h: weight @ h),
        "batch of products": lambda: net(x, lambda h: torch.bmm(weight[None], h[None])[0])[back],
    }


@pytest.mark.parametrize("way", ways(None, torch.arange(4)))
def test_a_batch_that_is_moved_only_later(way):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 0, 1, 2]):
        assert_right(engine, net, ways(net, torch.tensor(order))[way]())


def parts(net, lengths):
    """Losses of a batch of four whose elements have as many rows as these lengths say."""
    ends = lengths.cumsum(0)
    starts, segments = ends - lengths, torch.arange(4).repeat_interleave(lengths)
    sums = {
        "split": lambda h: torch.stack([part.sum(0) for part in h.split(lengths.tolist())]),
        "slice": lambda h: torch.stack([h[a:b].sum(0) for a, b in zip(starts, ends, strict=True)]),
        "narrow": lambda h: torch.stack([h.narrow(0, int(a), 2).sum(0) for a in starts.clamp_max(6)]),
        "select": lambda h: torch.stack([h[int(a)] for a in starts]),
        "as_strided": lambda h: torch.stack([h.as_strided((2, 4), (4, 1), 4 * int(a)).sum(0) for a in starts]),
        "segment_reduce": lambda h: torch.segment_reduce(h, "sum", lengths=lengths),
        "embedding_bag": lambda h: F.embedding_bag(torch.arange(8), h, starts, mode="sum"),
        "index_add": lambda h: torch.zeros(4, 4, dtype=torch.float64).index_add(0, segments, h),
    }
    return {way: lambda add=add: net(draw(8, 3), add) for way, add in sums.items()}


@pytest.mark.parametrize("way", parts(None, torch.full((4,), 2)))
def test_elements_that_become_longer_and_shorter(way):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for lengths in ([2, 2, 2, 2], [1, 3, 2, 2], [2, 2, 2, 2]):
        assert_right(engine, net, parts(net, torch.tensor(lengths))[way]())


def sums(net, chosen):
    """Losses that are sums of those of other elements, chosen by a matrix."""
    losses = net(draw(4, 3))
    return {
        "factors": lambda: (losses[None] * chosen).sum(1),
        "choices": lambda: torch.where(chosen > 0, losses[None], 0.0).sum(1),
        "masks": lambda: losses[None].expand(4, 4).masked_fill(chosen == 0, 0.0).sum(1),
        "logsumexp": lambda: (losses[None] + chosen.log()).logsumexp(1),
        "rot90": lambda: torch.rot90(losses[:, None].expand(4, 4) * torch.ones(4), 2 * int(chosen[0, 1])).sum(1),
    }


@pytest.mark.parametrize("way", ["factors", "choices", "masks", "logsumexp", "rot90"])
def test_losses_that_come_to_share_elements(way):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for chosen in (torch.eye(4), torch.ones(4, 4)):
        assert_right(engine, net, sums(net, chosen.double())[way]())


def shifted(net, k):
    """Losses of a batch that is moved by a number which changes no shape."""

    def padded(pad):
        return net(draw(4, 3), lambda h: pad(h)[:4])

    return {
        "constant": lambda: padded(lambda h: F.pad(h, (0, 0, k, 2 - k))),
        "reflect": lambda: padded(lambda h: F.pad(h.T[None], (k, 2 - k), mode="reflect")[0].T),
        "replicate": lambda: padded(lambda h: F.pad(h.T[None], (k, 2 - k), mode="replicate")[0].T),
        "unfold": lambda: net(draw(6, 3), lambda h: h.unfold(0, 3, 3 - k).sum(-1)),
    }


@pytest.mark.parametrize("way", ["constant", "reflect", "replicate", "unfold"])
def test_elements_that_are_shifted_by_another_number(way):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for k in (0, 1):
        assert_right(engine, net, shifted(net, k)[way]())


def test_a_batch_that_is_moved_later_in_a_graph_that_is_freed():
    net = Net()
    engine = Engine(net, batch_dim=0)
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 3, 2]):
        losses = ways(net, torch.tensor(order))["index"]()
        expected = explicit_gramian(losses, list(net.parameters()))
        assert relative_error(engine.compute_gramian(losses, retain_graph=False), expected) <= 1e-10


def test_what_moves_no_element_is_not_looked_at_again(probes):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for lengths in ([0, 1, 2, 0], [2, 2, 1, 0]):
        last = torch.tensor(lengths)
        assert_right(engine, net, net(draw(4, 3, 3), lambda h, last=last: h[torch.arange(4), last]))
        assert_right(engine, net, net(draw(4, 3)[:, None]).gather(1, torch.zeros(4, 1, dtype=torch.long))[:, 0])
    assert len(probes) == 2  # one for each of two graphs


@pytest.mark.parametrize("positions", [4, 8])
def test_another_axis_of_the_same_graph(positions):
    net = Net()
    engine = Engine(net, batch_dim=0)
    assert_right(engine, net, net(draw(4, positions, 3)).sum(1))
    assert_right(engine, net, net(draw(positions, 4, 3)).sum(0))


def flattened(net, positions, batch, weights=None):
    """Positions and batch in one axis, the batch running fastest."""
    losses = net(draw(positions * batch, 3))
    return (losses if weights is None else losses * weights.flatten()).view(positions, batch).sum(0)


def test_one_position_does_not_tell_which_axis_is_faster():
    net = Net()
    engine = Engine(net, batch_dim=0)
    for positions in (1, 4, 1, 3):
        assert_right(engine, net, flattened(net, positions, 4))


def test_losses_that_are_masked_do_not_tell_which_axis_is_faster():
    net = Net()
    engine = Engine(net, batch_dim=0)
    for weights in (torch.eye(4), torch.ones(4, 4), torch.ones(4, 4)):
        assert_right(engine, net, flattened(net, 4, 4, weights))


def test_losses_that_are_masked_do_not_tell_the_axis(probes):
    net = Net()
    engine = Engine(net, batch_dim=0)
    for weights in (torch.eye(4), torch.ones(4, 4), torch.ones(4, 4)):
        assert_right(engine, net, (net(draw(4, 4, 3)) * weights).sum(0))
    assert len(probes) == 2


class Scaled(nn.Module):
    """A parameter of its own stands before everything else."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = Net(), nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x):
        return self.net(x * self.scale)


def test_a_parameter_that_went_row_by_row_before():
    net = Scaled()
    engine = Engine(net, batch_dim=0)
    handle = net.scale.register_hook(lambda grad: 2 * grad)
    assert_right(engine, net, net(draw(4, 3)))
    handle.remove()
    assert_right(engine, net, net(draw(4, 3)))
