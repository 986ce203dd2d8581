"""Tensors that are not plain strided ones: subclasses, nested, sparse, meta, fake, complex.

Each case is a function of tensors. Through a frame it must give what it gives without; where torch's own checkpoint
takes it, so must ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frames_zoo import assert_same
from tensor_kinds import CASES, HOW, PAIRS, Case, Quantised, dense, jagged, lengths, random, run, swap, swap_back
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import recollect
import recollect.invertible as inn
from recollect.frames import couple


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_gives_what_plain_gives(name):
    case = CASES[name]
    kind, expected = run(case, HOW["plain"])
    found_kind, found = run(case, HOW["recollect"])
    assert found_kind is kind
    assert_same(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_nested_checkpoints_give_what_plain_gives(name):
    case = CASES[name]
    _, expected = run(case, HOW["plain"])
    _, found = run(case, lambda f, *args: recollect.checkpoint(lambda *a: recollect.checkpoint(f, *a), *args))
    assert_same(found, expected)


# What torch's checkpoint cannot take: tensors without a size, and a loss whose class overrides operations, because
# torch switches overrides off for a backward that such a loss starts, and with it for the recomputation.
NOT_TORCH = ("jagged_attention", "nested_strided", "torch_function_numbers_to_the_end")


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_TORCH])
def test_torchs_own_checkpoint_takes_the_cases(name):
    """The cases are sound: what torch's checkpoint cannot take is not asked of this one."""
    case = CASES[name]
    assert_same(run(case, HOW["torch"])[1], run(case, HOW["plain"])[1])


def test_ragged_sizes_that_are_made_inside_are_refused_or_right():
    """A ragged size is told apart by the tensor of offsets, which a rebuild makes anew."""
    case = Case(lambda *t: jagged(*t).tanh(), lengths, lambda y: y.values())
    try:
        _, found = run(case, HOW["recollect"])
    except recollect.frames.RebuildError:
        return
    assert_same(found, run(case, HOW["plain"])[1])


# Invertible functions and couplings of such tensors, in chains of three.


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")  # in bfloat16
@pytest.mark.parametrize("name", PAIRS)
def test_chain_of_inverses(name):
    make, prepare, view = PAIRS[name]

    def train(how: Callable[..., Any]) -> list[Tensor | None]:
        torch.manual_seed(0)
        leaves = make()
        a, b = prepare(*leaves)
        for _ in range(3):
            a, b = how(a, b)
        loss = view(a).abs().square().sum() + view(b).abs().sin().sum()
        return [dense(loss), *map(dense, torch.autograd.grad(loss, leaves))]

    found = train(lambda *args: recollect.checkpoint(swap, *args, inverse=swap_back))
    assert_same(found, train(swap), 0.2 if name == "bfloat16" else 1e-10)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("bfloat16", "no_elements")])
def test_chain_of_couplings(name):
    make, prepare, view = PAIRS[name]

    def train(enabled: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        leaves = make()
        x, _ = prepare(*leaves)
        for _ in range(3):
            x = couple([torch.tanh, torch.sin], x, [(), ()], dim=x.dim() - 1, enabled=enabled)
        loss = view(x).abs().square().sum()
        return [dense(loss), *map(dense, torch.autograd.grad(loss, leaves[:1]))]

    assert_same(train(True), train(False))


@pytest.mark.parametrize("kind", [inn.AdditiveCoupling, inn.AffineCoupling])
def test_couplings_with_quantised_weights(kind):
    def train(invertible: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        out = 2 if kind is inn.AffineCoupling else 1
        layers = [kind(*(nn.Linear(4, 4 * out).double() for _ in range(2)), dim=1) for _ in range(3)]
        for layer in layers:
            layer.invertible, layer.checkpoint = invertible, False
            for block in layer.blocks:
                block.weight = nn.Parameter(Quantised.of(block.weight * 0.3), requires_grad=False)
        x = leaf = random(3, 8)
        for layer in layers:
            x = layer(x * 1.0 if x is leaf else x)
        x.square().sum().backward()
        return [leaf.grad, *(block.bias.grad for layer in layers for block in layer.blocks)]

    assert_same(train(True), train(False))


# Tensors without elements: shapes and types are all that there is to compare.


class Network(nn.Module):
    """A checkpoint, an inverse and couplings, with dropout and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.coupling = inn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        self.affine = inn.AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4))
        self.wrap: Callable[..., Any] = recollect.checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.wrap(self.block, x)
        a, b = self.wrap(swap, *x.chunk(2, -1), inverse=swap_back)
        y: Tensor = self.affine(self.coupling(self.coupling(torch.cat([a, b], -1))))
        return y


def shapes(net: nn.Module, x: Tensor) -> list[Any]:
    net(x).square().sum().backward()
    return [(g.shape, g.dtype, g.device) for g in (x.grad, *(p.grad for p in net.parameters()))]


def test_meta_tensors():
    expected = shapes(Network(), torch.randn(5, 4, requires_grad=True))
    with torch.device("meta"):
        net, x = Network(), torch.randn(5, 4, requires_grad=True)
    found = shapes(net, x)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert {entry[2].type for entry in found} == {"meta"}


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors(inside):
    expected = shapes(Network(), torch.randn(5, 4, requires_grad=True))
    with FakeTensorMode() as mode:
        net, x = Network(), torch.randn(5, 4, requires_grad=True)
        loss = net(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    gradients = [x.grad, *(p.grad for p in net.parameters())]
    assert all(isinstance(g, FakeTensor) and g.fake_mode is mode for g in gradients)
    assert [(g.shape, g.dtype, g.device) for g in gradients] == expected


def test_fake_tensors_leave_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with FakeTensorMode():
        net, x = Network(), torch.randn(5, 4, requires_grad=True)
        net(x).sum().backward()
    assert_same(torch.rand(4), expected)


def test_modules_of_a_fake_mode_without_frames_compute_the_same_shapes():
    """The network itself is sound in these modes."""

    def plain(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        return function(*args)

    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            net, x = Network(), torch.randn(5, 4, requires_grad=True)
            net.wrap = plain
            for coupling in (net.coupling, net.affine):
                coupling.invertible = coupling.checkpoint = False
            assert shapes(net, x)[0][0] == (5, 4)


def test_an_argument_that_a_nested_tensor_of_the_region_is_made_of():
    """Such a tensor holds its values as the object that they are, which a rebuild must leave alone."""
    layer, offsets = nn.Linear(4, 4).double(), torch.tensor([0, 2, 5])
    x = random(5, 4).double().requires_grad_()

    def region(values):
        return layer(torch.nested.nested_tensor_from_jagged(values, offsets)).tanh().values()

    found = torch.autograd.grad(recollect.checkpoint(region, x * 1).square().sum(), [x, layer.weight])
    expected = torch.autograd.grad(region(x * 1).square().sum(), [x, layer.weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
