"""Stacks of residual blocks at full width against their recurrences, written out, and against plain autograd."""

from __future__ import annotations

import contextlib
import copy
import pickle
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recollect
from recollect.autogram import Engine
from recollect.frames import LatticeError
from recollect.memory import peak_memory
from recollect.reversible import BDIA, Midpoint

KINDS = {"midpoint": Midpoint, "bdia": BDIA}

each_kind = pytest.mark.parametrize("kind", KINDS)


class Block(nn.Module):
    """A residual branch: normalisation, two linear layers, dropout."""

    def __init__(self, channels: int = 6, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.first = nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(2 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return scale * self.second(self.dropout(self.first(self.norm(x)).tanh()))


class Attention(nn.Module):
    """A residual branch of a transformer: attention, then the network for each position."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, 3 * channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 16), nn.GELU(), nn.Linear(16, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(*self.project(self.norm(x)).chunk(3, -1), is_causal=True)
        return h + self.mlp(x + h)


class Convolution(nn.Module):
    """A layer of GCNII without its residual: an average over the neighbours, mixed with the first features."""

    def __init__(self, channels: int, layer: int, step: float) -> None:
        super().__init__()
        self.step = step  # small where the midpoint form, which is no residual network, would grow
        self.linear = nn.Linear(channels, channels)
        self.beta = 0.5 / (layer + 1)

    def forward(self, x: Tensor, first: Tensor, graph: Tensor) -> Tensor:
        h = 0.9 * torch.zeros_like(x).index_add(0, graph[1], x[graph[0]]) / 3 + 0.1 * first
        return self.step * (((1 - self.beta) * h + self.beta * self.linear(h)).relu() - x)


def make(kind: str, depth: int = 5, block=Block, **options) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]((block() for _ in range(depth)), **options)


def plain(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (Midpoint, BDIA)):
            module.disable = True
    return net


def of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def training(net: nn.Module, x: Tensor, *args) -> list[Tensor | None]:
    torch.manual_seed(5)
    y = net(x, *args)
    wanted = [x, *net.parameters()]
    return [y.detach(), *torch.autograd.grad((y.sin() * y).sum(), wanted, allow_unused=True)]


# What they compute.


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("exact", [False, 20])
def test_midpoint_is_the_recurrence(depth, exact):
    net = make("midpoint", depth, exact=exact).double().eval()
    x = of(4, 6).double()
    before, now = x, x + net.blocks[0](x)
    for block in net.blocks[1:]:
        before, now = now, before + 2 * block(now)
    torch.testing.assert_close(net(x), now, rtol=0, atol=1e-12 if exact is False else depth**2 * 1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_bdia_is_the_recurrence_of_rational_numbers(depth, monkeypatch):
    """With γ as drawn and s the parity of the activation before the last one."""
    k = 12
    net = make("bdia", depth, exact=k, block=lambda: Block(dropout=0.0)).double()
    drawn: list[Tensor] = []
    randint = torch.randint

    def draw(*args, **kwargs) -> Tensor:
        found = randint(*args, **kwargs)
        if args[0] == 2:  # the samples that tell of drift are drawn too
            drawn.append(found)
        return found

    monkeypatch.setattr(torch, "randint", draw)
    x = of(4, 6).double()
    y = net(x)

    def exactly(t: Tensor) -> list[Fraction]:
        return [Fraction(value) for value in t.flatten().tolist()]

    def q(values) -> list[Fraction]:
        return [Fraction(round(value * 2**k), 2**k) for value in values]

    def tensor(values: list[Fraction]) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64).view(4, 6)

    before = q(exactly(x))
    now = [a + b for a, b in zip(before, q(exactly(net.blocks[0](tensor(before)))), strict=True)]
    assert len(drawn) == depth - 1
    for block, coins in zip(net.blocks[1:], drawn, strict=True):
        gamma = (coins.double() - 0.5).view(4, 1).expand(4, 6)
        mixed = (1 - gamma) * tensor(now) + (1 + gamma) * block(tensor(now))
        halved = [g * (a + (a * 2**k) % 2 / 2**k) for g, a in zip(exactly(gamma), before, strict=True)]
        before, now = now, [a + b for a, b in zip(halved, q(exactly(mixed)), strict=True)]
    assert exactly(y) == now


def test_bdia_draws_both_signs_for_each_sample_and_layer():
    halves = []

    class Sees(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.ones_like(z)

    net = BDIA([Sees(), Sees()], exact=16)
    torch.manual_seed(0)
    for _ in range(20):
        halves.append(net(torch.zeros(8, 3)))
    y = torch.stack(halves)  # x_1 = 1, x_2 = γ 0 + (1 - γ) + (1 + γ) = 2
    assert y.eq(2.0).all()
    x = 4 * torch.ones(8, 3)  # x_1 = 5, x_2 = 4 γ + (1 - γ) 5 + (1 + γ) = 6
    y = torch.stack([BDIA([Sees(), nn.Identity()], exact=16)(x) for _ in range(20)])
    assert set(y.unique().tolist()) == {4 * g + (1 - g) * 5 + (1 + g) * 5 for g in (0.5, -0.5)}
    assert (y == y[..., :1]).all()
    assert 20 < (y[..., 0] == y.max()).sum() < 140


def test_in_evaluation_mode_bdia_is_the_residual_network():
    net = make("bdia").eval()
    x = of(4, 6)
    h = x
    for block in net.blocks:
        h = h + block(h)
    torch.testing.assert_close(net(x), h, rtol=0, atol=0)


def test_in_the_mean_bdia_trains_the_residual_network():
    net = make("bdia", block=lambda: Block(dropout=0.0))
    x = of(4, 6)
    with torch.no_grad():
        mean = torch.stack([net(x) for _ in range(400)]).mean(0)
        assert (mean - net.eval()(x)).norm() < 0.15 * net(x).norm()


# How they train.


@each_kind
@pytest.mark.parametrize("depth", [1, 2, 5, 8])
@pytest.mark.parametrize("blocks", [None, torch.bfloat16, torch.float16])
def test_gradients_bit_for_bit(kind, depth, blocks, same_bits):
    net, x = make(kind, depth), of(4, 6)
    with contextlib.nullcontext() if blocks is None else torch.autocast("cpu", blocks):
        same_bits(training(net, x), training(plain(copy.deepcopy(net)), x))
        assert net.last_drift == 0.0
        assert net.certificate.rounded == 0
        half = x.detach().bfloat16().requires_grad_()
        if blocks is not None:
            same_bits(training(net, half), training(plain(net), half))


@each_kind
@pytest.mark.parametrize("norm", [True, False])
def test_a_thousand_and_one_blocks(kind, norm, same_bits):
    """Eleven of them again and again, with weights that keep the stream in range."""
    modules = [Block(2, norm=norm) for _ in range(11)]
    net, x = KINDS[kind](modules[index % 11] for index in range(1001)), of(3, 2)
    for module in modules:
        nn.init.uniform_(module.second.weight, -0.02, 0.02)
        nn.init.zeros_(module.second.bias)
    same_bits(training(net, x), training(plain(net), x))
    assert len(net.blocks) == 1001


@each_kind
@pytest.mark.parametrize("anchor_every", [1, 2])
def test_anchors(kind, anchor_every, same_bits):
    x = of(4, 6)
    same_bits(training(make(kind, anchor_every=anchor_every), x), training(plain(make(kind)), x))


@each_kind
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 2, 3, 6), (6,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_types(kind, shape, dtype, same_bits):
    net, x = make(kind).to(dtype), of(*shape).detach().to(dtype).requires_grad_()
    found = training(net, x)
    assert found[0].shape == shape
    same_bits(found, training(plain(net), x))


@each_kind
def test_arguments_are_given_to_every_block(kind, same_bits):
    net, x = make(kind), of(4, 6)
    scale = torch.tensor(0.3, requires_grad=True)
    results = []
    for stack in (net, plain(copy.deepcopy(net))):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(stack(x, scale=scale).sin().sum(), [x, scale]))
    same_bits(*results)
    assert results[0][1] != 0


def under_a_checkpoint(net, x):
    return torch.autograd.grad(recollect.checkpoint(lambda x: net(x.sin()), x).sum(), [x, *net.parameters()])


def double(net, x):
    (first,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
    return [first.detach(), *torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)]


def twice(net, x):
    y, wanted = net(x), [x, *net.parameters()]
    return [*torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True), *torch.autograd.grad(y.cos().sum(), wanted)]


def batched(net, x):
    y = net(x)
    return torch.autograd.grad(y, [x, *net.parameters()], torch.randn(3, *y.shape), is_grads_batched=True)


def released(net, x):
    with recollect.eager_release():
        return torch.autograd.grad(net(x * 1).sin().sum(), [x, *net.parameters()])


def gramian(net, x):
    engine = Engine(net)
    return [engine.compute_gramian(net(x).square().sum(1))]


def copied(net, x):
    return training(pickle.loads(pickle.dumps(copy.deepcopy(net))), x)


@each_kind
@pytest.mark.parametrize("way", [under_a_checkpoint, double, twice, batched, released, gramian, copied])
def test_ways_to_differentiate(kind, way, same_bits):
    x, results = of(4, 6), []
    for net in (make(kind), plain(make(kind))):
        torch.manual_seed(5)
        results.append(way(net, x))
    same_bits(*results)


@each_kind
def test_a_transformer(kind, same_bits):
    net = nn.Sequential(nn.Linear(5, 8), make(kind, 6, Attention), nn.LayerNorm(8), nn.Linear(8, 5))
    x = of(2, 7, 5)
    same_bits(training(net, x), training(plain(net), x))


@each_kind
def test_layers_of_gcnii(kind, same_bits):
    torch.manual_seed(0)
    net = KINDS[kind](Convolution(6, layer, 0.1 if kind == "midpoint" else 1.0) for layer in range(9))
    first, graph = of(20, 6), torch.randint(20, (2, 60))
    results = []
    for stack in (net, plain(copy.deepcopy(net))):
        torch.manual_seed(5)
        y = stack(first, first, graph)
        results.append(torch.autograd.grad(y.sin().sum(), [first, *stack.parameters()]))
    same_bits(*results)


def test_without_exact_midpoint_comes_back_up_to_rounding():
    net, x = make("midpoint", 20, exact=False), of(4, 6)
    found = training(net, x)
    assert 0.0 < net.last_drift < 1e-4
    for one, other in zip(found, training(plain(net), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# What they keep.


@each_kind
def test_memory(kind):
    """Two activations, and of each layer of BDIA one bit for each value; the float version's is not exceeded."""
    rows, channels = 4000, 16

    def peak(depth: int, **options) -> float:
        net = make(kind, depth, lambda: Block(channels, 0.0), **options)
        x = of(rows, channels)
        net(x).sum().backward()
        with peak_memory("cpu") as memory:
            net(x).sum().backward()
        return memory.peak_bytes / (4 * rows * channels)

    short, long = peak(6), peak(66)
    bits = 60 * (1 + 1 / channels) / 32 if kind == "bdia" else 0.0  # of the values, and of γ
    assert bits <= long - short <= 1.05 * bits
    if kind == "midpoint":
        assert short <= 1.05 * peak(6, exact=False)


# What they refuse.


@each_kind
def test_what_is_refused(kind):
    with pytest.raises(ValueError, match="at least one block"):
        KINDS[kind]([])
    with pytest.raises(ValueError, match="exact"):
        KINDS[kind]([Block()], exact=60)
    with pytest.raises(TypeError, match="x must be a tensor"):
        make(kind)([1.0])
    with pytest.raises(TypeError, match="float32 or float64"):
        make(kind).bfloat16()(of(4, 6).bfloat16())
    with pytest.raises(LatticeError, match="exact=23"):
        make(kind, exact=23)(of(4, 6))
    for block in (nn.Linear(6, 3), nn.LSTM(6, 6)):
        for depth in (0, 1, 2):
            stack = KINDS[kind]([*(Block() for _ in range(depth)), block])
            with pytest.raises(ValueError, match="must return a tensor of its input's shape") as caught:
                stack(of(4, 6))
            which = {0: "block 0, of 1", 1: "blocks 0 and 1, of 2", 2: "block 2, of 3"}
            assert which[depth] in "".join(caught.value.__notes__)
    if kind == "bdia":
        with pytest.raises(ValueError, match="exact must be True or k"):
            BDIA([Block()], exact=False)


@each_kind
def test_reset_parameters(kind):
    net = make(kind)
    before = [p.clone() for p in net.parameters()]
    net.reset_parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True) if a.dim() == 2)
    assert "exact=True" in repr(net)
