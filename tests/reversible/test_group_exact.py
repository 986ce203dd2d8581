"""With `exact`, gradients are those of the same network with everything kept, bit for bit, at any depth."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect
from recollect.autogram import Engine
from recollect.frames import LatticeError
from recollect.memory import peak_memory
from recollect.models import RevGNN
from recollect.reversible import GroupAddRev, GroupRevRes

NORMS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class Small(nn.Module):
    """Two linear layers with a normalisation and dropout; the graph, if there is one, averages."""

    def __init__(self, channels: int, norm: str = "layer", dropout: float = 0.3) -> None:
        super().__init__()
        self.norm = NORMS[norm](channels)
        self.first = nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(2 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        for linear in (self.first, self.second):
            linear.reset_parameters()

    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        h = self.second(self.dropout(self.first(self.norm(x)).tanh()))
        return h if graph is None else torch.zeros_like(h).index_add(0, graph[1], h[graph[0]])


class Deep(nn.Module):
    """A chain of grouped layers."""

    def __init__(self, depth: int = 6, channels: int = 4, groups: int = 2, block=Small, exact=True, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            GroupAddRev(block(channels), num_groups=groups, exact=exact, **options) for _ in range(depth)
        )

    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, graph)
        return x


def plain(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (GroupAddRev, GroupRevRes)):
            module.disable = True
    return net


def of(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, channels, generator=generator, dtype=dtype).requires_grad_()


def training(net: nn.Module, x: Tensor, *args) -> list[Tensor | None]:
    """The output and all gradients."""
    torch.manual_seed(5)
    y = net(x, *args)
    wanted = [x, *net.parameters()]
    return [y.detach(), *torch.autograd.grad((y.sin() * y).sum(), wanted, allow_unused=True)]


class Cycled(nn.Module):
    """A thousand and one layers, of eleven modules: the first call of each takes its time."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.layers = Deep(11, 2, block=lambda c: Small(c, norm)).layers

    def forward(self, x: Tensor) -> Tensor:
        for index in range(1001):
            x = self.layers[index % 11](x, None)
        return x


@pytest.mark.parametrize(("blocks", "norm"), [(None, "none"), (torch.bfloat16, "layer"), (torch.float16, "none")])
def test_a_thousand_and_one_layers(blocks, norm, same_bits):
    net, x = Cycled(norm), of(3, 4)
    with contextlib.nullcontext() if blocks is None else torch.autocast("cpu", blocks):
        found = training(net, x)
        assert net.layers[0].last_drift == 0.0
        assert {layer.certificate.rounded for layer in net.layers} == {0}
        assert {layer.certificate.equal for layer in net.layers} == {2 * 91}
        same_bits(found, training(plain(net), x))


def test_without_it_the_same_network_is_off(same_bits):
    """So that the test above shows something."""
    net = Deep(100, 2, block=lambda c: Small(c, "none"), exact=False)
    x = of(3, 4)
    found = training(net, x)
    assert net.layers[0].last_drift > 0.0
    with pytest.raises(AssertionError, match="elements differ"):
        same_bits(found, training(plain(net), x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_norms_and_types(dtype, groups, norm, same_bits, edge_index):
    net = Deep(groups=groups, block=lambda c: Small(c, norm)).to(dtype)
    x = of(7, 4 * groups, dtype)
    other = plain(copy.deepcopy(net))
    same_bits(training(net, x, edge_index), training(other, x, edge_index))
    same_bits(list(net.buffers()), list(other.buffers()))


@pytest.mark.parametrize("anchor_every", [1, 2, 3])
def test_anchors(anchor_every, same_bits):
    x = of(7, 8)
    same_bits(training(Deep(anchor_every=anchor_every), x), training(plain(Deep()), x))


@pytest.mark.parametrize("split_dim", [0, 1, 2, -2])
def test_other_dimensions(split_dim, same_bits):
    class Mixes(nn.Module):
        def forward(self, x: Tensor, graph: None) -> Tensor:
            return (x.flatten(1).sum(1).view(-1, 1, 1) + 3 * x).tanh() / 3

    class Stack(Deep):
        def __init__(self) -> None:
            super().__init__(block=lambda c: Mixes(), split_dim=split_dim)

    x = torch.randn(4, 6, 8, requires_grad=True)
    same_bits(training(Stack(), x), training(plain(Stack()), x))


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_one_thread_takes(threads, same_bits):
    net, x, before = Deep(2, 32), of(2000, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_bits(training(net, x), training(plain(net), x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("exact", [1, 5, 12, 20])
def test_digits(exact, same_bits):
    x = of(7, 8)
    net = Deep(exact=exact)
    found = training(net, x)
    same_bits(found, training(plain(net), x))
    assert torch.equal(found[0] * 2**exact, (found[0] * 2**exact).round())
    assert not torch.equal(found[0] * 2 ** (exact - 1), (found[0] * 2 ** (exact - 1)).round())


def test_zeros_with_a_sign(same_bits):
    class Zero(Small):
        def forward(self, x: Tensor, graph: None = None) -> Tensor:
            return -0.0 * super().forward(x)

    x = (-torch.zeros(7, 8)).requires_grad_()
    found = training(Deep(block=Zero), x)
    assert not found[0].signbit().any()
    same_bits(found, training(plain(Deep(block=Zero)), x))


def test_the_inverse_gives_the_bits_back(same_bits, edge_index):
    net = Deep().eval()
    x = (of(7, 8).detach() * 2**16).round() / 2**16
    y = net(x, edge_index)
    for layer in reversed(net.layers):
        y = layer.inverse(y, edge_index)
    same_bits([y], [x])
    layer = net.layers[0]
    z = x.clone().requires_grad_()
    found = torch.autograd.grad(layer.inverse(z, edge_index).sin().sum(), [z, *layer.parameters()])
    same_bits(found, torch.autograd.grad(plain(layer).inverse(z, edge_index).sin().sum(), [z, *layer.parameters()]))


def double(net, x):
    y = net(x)
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return [first.detach(), *torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)]


def batched(net, x):
    y = net(x)
    return torch.autograd.grad(y, [x, *net.parameters()], torch.randn(3, *y.shape), is_grads_batched=True)


def twice(net, x):
    y, wanted = net(x), [x, *net.parameters()]
    return [*torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True), *torch.autograd.grad(y.cos().sum(), wanted)]


def a_part(net, x):
    return torch.autograd.grad(net(x).sin().sum(), list(net.parameters())[:3])


def under_a_checkpoint(net, x):
    return torch.autograd.grad(recollect.checkpoint(lambda x: net(x.sin()), x).sum(), [x, *net.parameters()])


def under_torch_checkpoint(net, x):
    y = torch_checkpoint(lambda x: net(x.sin()), x, use_reentrant=False)
    return torch.autograd.grad(y.sum(), [x, *net.parameters()])


def released(net, x):
    with recollect.eager_release():
        return torch.autograd.grad(net(x * 1).sin().sum(), [x, *net.parameters()])


def gramian(net, x):
    engine = Engine(net)
    return [engine.compute_gramian(net(x).square().sum(1))]


def jacobian(net, x):
    return [torch.func.jacrev(lambda x: net.eval()(x))(x.detach())]


def mapped(net, x):
    return [torch.func.vmap(net.eval())(torch.stack([x.detach()] * 3))]


def per_sample(net, x):
    parameters = {name: p.detach() for name, p in net.eval().named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(net, parameters, (row[None],)).sin().sum()

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach()).values())


def forward_mode(net, x):
    return [t.detach() for t in torch.func.jvp(net.eval(), (x.detach(),), (torch.ones_like(x),))]


def without_grad(net, x):
    with torch.no_grad():
        return [net(x)]


def copied(net, x):
    return training(pickle.loads(pickle.dumps(copy.deepcopy(net))), x)


WAYS = [
    double, batched, twice, a_part, under_a_checkpoint, under_torch_checkpoint, released, gramian, jacobian, mapped,
    per_sample, forward_mode, without_grad, copied,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of forward mode through normalisations
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_differentiate(way, same_bits):
    x, results = of(7, 8), []
    for net in (Deep(), plain(Deep())):
        torch.manual_seed(5)
        results.append(way(net, x))
    same_bits(*results)


def test_compiled_it_is_plain():
    net, x = Deep(2).eval(), of(7, 8)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_modules_that_were_pickled_before():
    layer = GroupAddRev(Small(4), num_groups=2)
    del layer.__dict__["exact"]
    again = pickle.loads(pickle.dumps(layer))
    assert again.exact is False
    again(torch.randn(3, 8), None).sum().backward()


def test_state_dicts_are_the_same():
    buffer = io.BytesIO()
    torch.save(Deep(exact=False).state_dict(), buffer)
    buffer.seek(0)
    Deep().load_state_dict(torch.load(buffer))


def test_memory_does_not_grow_with_depth():
    peaks = []
    for exact in (False, True):
        for depth in (4, 40):
            net, x = Deep(depth, 16, block=lambda c: Small(c, dropout=0.0), exact=exact), of(2000, 32)
            net(x).sum().backward()
            with peak_memory("cpu") as memory:
                net(x).sum().backward()
            peaks.append(memory.peak_bytes)
    rounds, deep_rounds, exact, deep_exact = peaks
    assert deep_exact <= 1.02 * exact
    assert exact <= 1.05 * rounds
    assert deep_exact <= 1.05 * deep_rounds


def test_group_rev_res(same_bits, edge_index):
    torch.manual_seed(0)

    class OfGraph(Small):
        def forward(self, graph, x):
            return super().forward(x, graph)

    layer = GroupRevRes(OfGraph(4), 2, exact=True)
    x = of(7, 8)
    results = []
    for net in (layer, plain(layer)):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(net(edge_index, x).sin().sum(), [x, *layer.parameters()]))
    same_bits(*results)


@pytest.mark.parametrize("conv", ["sage", "gcn", "gin", "gat", "gen"])
@pytest.mark.parametrize("tied", [False, True])
def test_rev_gnn(conv, tied, same_bits, edge_index):
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    net = RevGNN(5, 8, 3, num_layers=12, conv=conv, dropout=0.2, exact=True, tied=tied)
    x, results = of(7, 5), []
    for net.disable in (False, True):
        results.append(training(net, x, edge_index))
    same_bits(*results)
    assert net.layers[0].anchor_every is None


def test_what_is_out_of_range_names_the_layer():
    net = Deep(3, exact=22)
    with pytest.raises(LatticeError, match=r"exact=22 the stream holds \|x\| < 4 in torch.float32"):
        net(of(50, 8) * 2)
    for layer in net.layers:
        layer.exact = 20
    net(of(50, 8) * 2)
