"""Exact additive couplings: bit for bit, also among layers that round, and among those that move values about."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import recollect.invertible as inn
from recollect.memory import peak_memory
from recollect.testing import check_invertible


def block(channels: int, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, out or channels))


def coupling(exact: bool | int = True, channels: int = 4, groups: int = 2, **options) -> inn.Module:
    return inn.AdditiveCoupling(*(block(channels) for _ in range(groups)), exact=exact, **options)


def reversed_coupling(**options) -> inn.Module:
    return coupling(**options).reverse()


def training(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    torch.manual_seed(5)
    y = net(x)
    return [y.detach(), *torch.autograd.grad((y.sin() * y).sum(), [x, *net.parameters()])]


def plain(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, inn.Module):
            module.checkpoint = False
    return net


def of(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, channels, generator=generator, dtype=dtype).requires_grad_()


CHAINS = {
    "couplings": lambda: [coupling() for _ in range(5)],
    "reversed": lambda: [reversed_coupling() for _ in range(5)],
    "both directions": lambda: [coupling(), reversed_coupling(), coupling(), reversed_coupling()],
    "three groups": lambda: [inn.ConstantPad((2, 2)), *(coupling(groups=3) for _ in range(3))],
    "sizes": lambda: [inn.AdditiveCoupling(block(5, 3), block(3, 5), sizes=(3, 5), exact=True) for _ in range(4)],
    "permuted": lambda: [coupling(), Swap(), coupling(), Swap(), coupling()],
    "reshaped": lambda: [
        coupling(),
        inn.Unflatten(1, (2, 4)),
        inn.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), exact=True),
        inn.Flatten(),
        coupling(),
    ],
    "several k": lambda: [coupling(), coupling(10), coupling(12), coupling(12), coupling()],
    "a layer that keeps": lambda: [coupling(), Kept(), coupling()],
}


class Swap(inn.Permute):
    """The dimensions of the channels, there and back."""

    def __init__(self) -> None:
        super().__init__(0, 1)


class Kept(inn.Module):
    """Invertible by hand, and a checkpoint all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.invertible = False
        self.linear = nn.Linear(8, 8)

    def function(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("blocks", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chain", CHAINS)
def test_gradients_bit_for_bit(chain, blocks, same_bits):
    torch.manual_seed(0)
    net, x = inn.Sequential(*CHAINS[chain]()), of(6, 8)
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if blocks is torch.float64:
        net, x = net.double(), of(6, 8, torch.float64)
    elif blocks is not None:
        context = torch.autocast("cpu", blocks)
    with context:
        same_bits(training(net, x), training(plain(net), x))


LOSSY = {
    "linear": lambda: inn.Linear(8, 8),
    "a coupling that rounds": lambda: coupling(False),
    "affine": lambda: inn.AffineCoupling(nn.Linear(4, 8), nn.Linear(4, 8)),
    "activation": lambda: inn.LeakyReLU(),
    "norm": lambda: inn.ActNorm(8),
}


@pytest.mark.parametrize("layer", LOSSY)
def test_among_layers_that_round(layer):
    """What an exact layer needs is kept where the next one could not bring it back."""
    torch.manual_seed(0)
    net, x = inn.Sequential(coupling(), coupling(), LOSSY[layer](), coupling(), coupling()), of(6, 8)
    net(x)  # ActNorm takes its scale from here
    found = training(net, x)
    for one, other in zip(found, training(plain(net), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_modules_that_move_values_break_no_chain():
    peaks = []
    for number in (2, 20):
        layers = [m for _ in range(number) for m in (coupling(), inn.Unflatten(1, (2, 4)), inn.Flatten())]
        net, x = inn.Sequential(*layers), of(3000, 8)
        net(x).sum().backward()
        with peak_memory("cpu") as memory:
            net(x).sum().backward()
        peaks.append(memory.peak_bytes)
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_the_inverse_gives_the_bits_back(groups, reverse, same_bits):
    torch.manual_seed(0)
    net = inn.Sequential(*(coupling(groups=groups) for _ in range(5))).eval()
    x = (of(6, 4 * groups).detach() * 2**16).round() / 2**16
    there, back = (net.inverse, net) if reverse else (net, net.inverse)
    y = there(x)
    assert not torch.equal(x, y)
    same_bits([back(y)], [x])


def test_reversed_it_trains_bit_for_bit(same_bits):
    torch.manual_seed(0)
    net = inn.Sequential(*(coupling() for _ in range(4))).reverse()
    x = of(6, 8)
    same_bits(training(net, x), training(plain(net), x))


def test_log_determinants_are_zero_and_flows_train():
    net, x = inn.Sequential(coupling(), coupling()), of(6, 8)
    y, log_det = net.forward_and_log_det(x)
    assert log_det.eq(0).all()
    (y.square().sum() + log_det.sum()).backward()
    assert x.grad is not None


def test_it_is_what_it_says():
    net = inn.Sequential(*(coupling() for _ in range(4)))
    assert check_invertible(net, of(6, 8).detach())
    assert net.check(of(6, 8).detach())
    assert "exact=True" in repr(net)
    assert "exact" not in repr(coupling(False))


def test_copies_and_modules_that_were_pickled_before(same_bits):
    torch.manual_seed(0)
    net, x = inn.Sequential(coupling(), coupling()), of(6, 8)
    same_bits(training(pickle.loads(pickle.dumps(copy.deepcopy(net))), x), training(net, x))
    old = coupling()
    del old.__dict__["exact"]
    assert pickle.loads(pickle.dumps(old)).exact is False


@pytest.mark.parametrize("exact", [0, -3, 53, 2.5, "k"])
def test_what_exact_may_be(exact):
    with pytest.raises((TypeError, ValueError), match="exact"):
        coupling(exact)
