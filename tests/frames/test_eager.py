"""``eager_release``: what is freed, what is left alone, and what reading a freed tensor does."""

import copy
import functools
import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.utils import dlpack

import recollect
from recollect.frames import ReleasedTensorError
from recollect.reversible import GroupAddRev, InvertibleModule


class Affine(InvertibleModule):
    """y = x Wᵀ + b with a wide W, inverted by the pseudo-inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.double))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.double))

    def _forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.bias) @ self.weight.T.pinverse()


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels, dtype=torch.double)

    def forward(self, z: Tensor, _: None) -> Tensor:
        return self.linear(z).tanh()


def coupling() -> GroupAddRev:
    return GroupAddRev(Block(), num_groups=2)


def features(requires_grad: bool = False) -> Tensor:
    return torch.randn(6, 8, dtype=torch.double, requires_grad=requires_grad)


def size(tensor: Tensor) -> int:
    return tensor.untyped_storage().size()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_input_is_freed_and_restored(requires_grad: bool) -> None:
    x = torch.randn(10, 3, dtype=torch.double, requires_grad=requires_grad)
    values, version, module = x.detach().clone(), x._version, Affine()
    with recollect.eager_release(True):
        y = module(x)
    assert size(x) == 0
    assert x.shape == (10, 3)
    assert x.dtype == torch.double
    y.sum().backward()
    assert size(x) == values.numel() * 8
    assert type(x) is Tensor
    assert x._version == version
    torch.testing.assert_close(x.detach(), values)


def test_reading_a_freed_tensor_names_the_module() -> None:
    x = torch.randn(10, 3, dtype=torch.double)
    with recollect.eager_release():
        y = Affine()(x)
    for read in (lambda: x + 1, lambda: repr(x), lambda: x.tolist(), lambda: x[0], lambda: copy.deepcopy(x)):
        with pytest.raises(ReleasedTensorError, match=r"Affine.*released its memory.*keep="):
            read()
    assert y.shape == (10, 5)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.cat([x, x]),
        lambda x: torch.relu(input=x),
        lambda x: torch._foreach_add([x], 1),
        lambda x: torch.add(torch.ones(10, 3), 1, out=x),
    ],
    ids=["cat", "keyword", "foreach", "out"],
)
def test_the_module_is_named_wherever_the_tensor_is(read) -> None:
    x = torch.randn(10, 3, dtype=torch.double)
    with recollect.eager_release():
        y = Affine()(x)
    with pytest.raises(ReleasedTensorError, match="input of Affine"):
        read(x)
    assert y.shape == (10, 5)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.tensor(x),
        lambda x: torch.as_tensor(x, dtype=torch.float32).sum(),
        lambda x: torch.asarray(x, copy=True).sum(),
        lambda x: torch.DoubleTensor(x).sum(),
        lambda x: torch.ones(3, dtype=torch.double).new_tensor(x).sum(),
        lambda x: x.as_subclass(Tensor).sum(),
        lambda x: torch.func.vmap(lambda row: row.sum())(x),
        lambda x: torch.func.grad(lambda t: t.sum())(x),
        lambda x: dlpack.from_dlpack(dlpack.to_dlpack(x)).sum(),
        lambda x: setattr(torch.ones(3, dtype=torch.double), "data", x),
        lambda x: (torch.ones(10, 3, dtype=torch.double, requires_grad=True) * 2).backward(x),
    ],
)
@pytest.mark.filterwarnings("ignore")  # copies of tensors are advised against
def test_what_does_not_ask_python_finds_no_elements(read) -> None:
    """Reading an empty storage behind a full shape would end the process."""
    x = torch.randn(10, 3, dtype=torch.double)
    values = x.clone()
    with recollect.eager_release():
        y = Affine()(x)
    with suppress(RuntimeError, ValueError):
        found = read(x)
        assert not isinstance(found, Tensor) or found.numel() == 0 or not found.any()
    y.sum().backward()
    torch.testing.assert_close(x, values)


def test_by_default_nothing_is_freed() -> None:
    x = torch.randn(10, 3, dtype=torch.double)
    values = x.clone()
    y = Affine()(x)
    assert torch.equal(x, values)
    with recollect.eager_release(False):
        y = Affine()(x)
    assert torch.equal(x, values)
    assert y.requires_grad


def test_chain_of_couplings_frees_every_input_and_keeps_the_gradient() -> None:
    layers, x = [coupling() for _ in range(4)], features(requires_grad=True)

    def run() -> list[Tensor]:
        states = [x * 2]
        for layer in layers:
            states.append(layer(states[-1], None))
        return states

    plain = run()
    (expected,) = torch.autograd.grad(plain[-1].square().sum(), x)
    with recollect.eager_release():
        states = run()
    assert [size(s) for s in states] == [0, 0, 0, 0, 6 * 8 * 8]
    (gradient,) = torch.autograd.grad(states[-1].square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    for state, kept in zip(states, plain, strict=True):
        torch.testing.assert_close(state.detach(), kept.detach(), rtol=1e-10, atol=1e-12)


def test_coupling_as_a_block_of_a_coupling_frees_its_input_within() -> None:
    layer = GroupAddRev(nn.ModuleList([GroupAddRev(Block(2), num_groups=2), Block()]))
    x = features(requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x * 2, None).square().sum(), x)
    with recollect.eager_release():
        y = layer(x * 2, None)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_leaf_that_is_freed_gets_its_gradient() -> None:
    layer, x = coupling(), features(requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x, None).square().sum(), x)
    with recollect.eager_release():
        y = layer(x, None)
    assert size(x) == 0
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)
    assert size(x) == 6 * 8 * 8


class Halve(nn.Module):
    """A block of which autograd saves nothing, so that backward never asks for its rebuild."""

    def forward(self, z: Tensor, _: None) -> Tensor:
        return z * 0.5


CALLS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Shift(nn.Module):
    """A block that counts its calls, and of which the gradient of ``bias`` needs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.double)

    def forward(self, z: Tensor, _: None) -> Tensor:
        CALLS[self] = CALLS.get(self, 0) + 1
        return self.linear(z)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: recollect.checkpoint(lambda h: h * 2, x, inverse=lambda y: y / 2),
        lambda x: GroupAddRev(Halve(), num_groups=2)(x, None),
        lambda x: GroupAddRev(Halve(), num_groups=2)(GroupAddRev(Halve(), num_groups=2)(x, None), None),
    ],
    ids=["inverse", "coupling", "chain"],
)
def test_values_come_back_where_nothing_was_saved_for_backward(run) -> None:
    leaf = features(requires_grad=True)
    x = leaf * 1
    with recollect.eager_release():
        y = run(x)
    assert size(x) == 0
    y.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.detach(), leaf.detach())
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("block", [Halve, lambda: Shift().requires_grad_(False)], ids=["no parameters", "frozen"])
def test_leaf_of_which_nothing_was_saved_gets_its_gradient(block, layers) -> None:
    stack = [GroupAddRev(block(), num_groups=2) for _ in range(layers)]
    x = features(requires_grad=True)
    values = x.detach().clone()
    (expected,) = torch.autograd.grad(functools.reduce(lambda h, layer: layer(h, None), stack, x).sum(), x)
    with recollect.eager_release():
        y = functools.reduce(lambda h, layer: layer(h, None), stack, x)
    assert size(x) == 0
    for times in (1, 2):
        y.sum().backward(retain_graph=True)
        torch.testing.assert_close(x.grad, times * expected)
        torch.testing.assert_close(x.detach(), values)
    assert not x._backward_hooks


def test_values_come_back_after_a_gradient_that_needs_no_rebuild() -> None:
    layer = GroupAddRev(nn.ModuleList([Shift(), Shift()]))
    blocks = list(layer.convs)
    x = features(requires_grad=True) * 1
    values = x.detach().clone()
    with recollect.eager_release():
        y = layer(x, None)
    torch.autograd.grad(y.sum(), blocks[1].linear.bias)
    torch.testing.assert_close(x.detach(), values)


def test_bringing_values_back_evaluates_no_block_again() -> None:
    layer = GroupAddRev(nn.ModuleList([Shift(), Shift()]))
    with recollect.eager_release():
        y = layer(features(requires_grad=True) * 1, None)
    y.square().sum().backward()
    assert [CALLS[block] for block in layer.convs] == [2, 2]


def test_nothing_of_a_released_graph_waits_for_the_garbage_collector() -> None:
    layer, leaf = GroupAddRev(Halve(), num_groups=2), features(requires_grad=True)
    gc.disable()
    try:
        for backward in (False, True):
            x = leaf * 1
            with recollect.eager_release():
                y = layer(x, None)
            dead = [weakref.ref(x), weakref.ref(y)]
            if backward:
                y.sum().backward()
            del x, y
            assert [reference() for reference in dead] == [None, None]
    finally:
        gc.enable()


def left_alone(case: str) -> tuple[Tensor, list[object]]:
    """Run a layer on an input that somebody else needs; return the input and what must stay alive."""
    layer, leaf = coupling(), features(requires_grad=True)
    x = leaf * 2
    if case == "saved by another operation":
        return x, [x * x, layer(x, None)]
    if case == "a leaf saved by another operation":
        return leaf, [leaf * leaf, layer(leaf, None)]
    if case == "an output saved by its own operation":
        x = leaf.exp()
        return x, [layer(x, None)]
    if case == "a view of it is held":
        return x, [x.view(8, 6), layer(x, None)]
    if case == "it is a view":
        return x, [layer(x[:3], None)]
    if case == "an alias is held":
        return x, [x.detach(), layer(x, None)]
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "saved by another operation",
        "a leaf saved by another operation",
        "an output saved by its own operation",
        "a view of it is held",
        "it is a view",
        "an alias is held",
    ],
)
def test_tensors_that_others_need_are_left_alone(case: str) -> None:
    with recollect.eager_release():
        x, held = left_alone(case)
    assert size(x) == 6 * 8 * 8
    sum(t.sum() for t in held if isinstance(t, Tensor)).backward()


def test_keep_and_aliased_outputs_are_left_alone() -> None:
    x = features()
    weight = torch.linalg.qr(torch.randn(8, 8, dtype=torch.double))[0].requires_grad_()
    with recollect.eager_release():
        kept = recollect.checkpoint(lambda h: h @ weight, x, inverse=lambda y: y @ weight.T, keep=(x,))
        assert size(x) > 0
        both = recollect.checkpoint(lambda h: (h @ weight, h[:2]), x, inverse=lambda y, _: y @ weight.T)
        assert size(x) > 0
        freed = recollect.checkpoint(lambda h: h @ weight, x, inverse=lambda y: y @ weight.T)
        # ``both``'s second output is a view of x, so x still is not freed.
        assert size(x) > 0
        del both
    assert kept.requires_grad
    assert freed.requires_grad


def test_without_grad_nothing_is_freed() -> None:
    x = features()
    with recollect.eager_release(), torch.no_grad():
        coupling()(x, None)
    assert size(x) == 6 * 8 * 8
