"""What shares memory with an argument: the rebuild must save the same part of the same argument."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import recollect
from recollect.frames import Offload, RebuildError
from recollect.frames._given import Given


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["kept", "host", "file"])
def source(request, tmp_path):
    return {"kept": None, "host": Offload(), "file": Offload(path=tmp_path)}[request.param]


INDICES = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])


def coalesced(values):
    return torch.sparse_coo_tensor(INDICES, values, (4, 4), is_coalesced=True, check_invariants=True)


def jagged():
    return torch.nested.nested_tensor([draw(2, 4), draw(3, 4)], layout=torch.jagged)


# What a region takes of its arguments in the call number n: another part of the same shape each time.
PARTS = {
    "columns": (lambda a, n: a[:, n : n + 4], lambda: (draw(4, 8),)),
    "transposed": (lambda a, n: a.T if n % 2 else a, lambda: (draw(4, 4),)),
    "large and transposed": (lambda a, n: a.T if n % 2 else a, lambda: (draw(70, 70),)),
    "computed and transposed": (lambda a, n: a.sin().T if n % 2 else a.sin(), lambda: (draw(70, 70),)),
    "one of two": (lambda a, b, n: (a, b)[n % 2], lambda: (draw(4, 4), draw(4, 4))),
    "one of two parts": (lambda a, b, n: (a, b)[n % 2], lambda: draw(8, 4).chunk(2)),
    "values of a sparse tensor": (lambda a, n: coalesced(a.coalesce().values() * n), lambda: (coalesced(draw(4)),)),
    "values of a nested tensor": (lambda a, n: a * n, lambda: (jagged(),)),
}


@pytest.mark.parametrize("certify", [True, "exact"])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("repeats", [True, False])
def test_another_part_of_an_argument(kind, repeats, certify, source):
    take, make = PARTS[kind]
    arguments = make()
    weight = draw(arguments[0].shape[-1] if "columns" not in kind else 4, 3).requires_grad_()
    counter = itertools.chain([1], itertools.repeat(1 if repeats else 2))

    def product(*args):
        return take(*args, next(counter)) @ weight

    def total(output):
        return (output.values() if output.is_nested else output).square().sum()

    output = recollect.checkpoint(product, *arguments, source=source, certify=certify)
    if not repeats:
        with pytest.raises(RebuildError, match="has other values"):
            total(output).backward()
        return
    total(output).backward()
    (expected,) = torch.autograd.grad(total(take(*arguments, 1) @ weight), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "expanded": lambda: draw(1, 4).expand(4, 4),
    "transposed": lambda: draw(4, 4).T,
    "overlapping": lambda: draw(7).unfold(0, 4, 1),
    "every second": lambda: draw(4, 8)[:, ::2],
    "conjugate": lambda: torch.complex(draw(4, 4), draw(4, 4)).conj().imag,
    "empty": lambda: draw(0, 4),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_arguments_that_come_back_in_another_layout(kind, source):
    """Hooks around the frame may return what they keep in memory of another layout; the values are the same."""
    x = LAYOUTS[kind]()
    weight = draw(3).requires_grad_()

    def region(x, weight):
        return x[:, :3] * weight + x[:, 1:] * weight + x.T[:3].T * weight

    with saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
        recollect.checkpoint(region, x, weight * 1, source=source).sum().backward()
    (expected,) = torch.autograd.grad(region(x, weight).sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_container_that_the_region_empties():
    weight = draw(4, 4).requires_grad_()

    def region(state):
        return state.pop("x") @ weight

    x = draw(4, 4)
    recollect.checkpoint(region, {"mask": None, "x": x}).sum().backward()
    assert torch.equal(weight.grad, x.T @ torch.ones_like(x))


def test_gradient_within_the_region():
    layer, x = nn.Linear(4, 4).double(), draw(3, 4)

    def region(state):
        y = (state[0] * layer.weight[0]).square().sum()
        return torch.autograd.grad(y, layer.weight, create_graph=True)[0].square().sum()

    recollect.checkpoint(region, [x]).backward()
    found, layer.weight.grad = layer.weight.grad, None
    region([x]).backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-12, atol=1e-12)


def test_part_of_none():
    x, y = draw(4, 4), draw(4, 4)
    given = Given([x[:2]])
    assert given.part_of(y) is None
    assert given.part_of(x) is None  # more than the argument
    assert given.part_of(x[1:2]) is not None
    assert given.value_of(Given([x, y]).part_of(y), y.shape, y.dtype) is None
