"""Frames in a row: gradients of plain autograd, the first input kept alone, and every function run once more."""

import random

import pytest
import torch
from torch import nn

import recollect
from recollect.frames import InPlaceError, Kept, Previous, RebuildError
from recollect.memory import peak_memory


def layers(depth: int = 12, width: int = 32, dropout: float = 0.2) -> list[nn.Module]:
    torch.manual_seed(0)
    parts = [[nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.GELU()] for _ in range(depth)]
    return [nn.Sequential(*part).double() for part in parts]


def gradients(stack, source, between=lambda h: h):
    torch.manual_seed(1)
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    h = x * 1
    for layer in stack:
        h = between(layer(h) if source is None else recollect.checkpoint(layer, h, source=source))
    return torch.autograd.grad(h.square().sum(), [x, *[p for layer in stack for p in layer.parameters()]])


@pytest.mark.parametrize("length", [1, 2, 5, None])
@pytest.mark.parametrize("between", [lambda h: h, lambda h: h + 1, lambda h: h.relu_()])
def test_gradients_are_those_of_plain_autograd(length, between):
    stack = layers()
    for found, expected in zip(
        gradients(stack, Previous(length), between), gradients(stack, None, between), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_row_keeps_its_first_input_alone():
    stack = layers(dropout=0.0)

    def kept(source):
        with peak_memory("cpu") as memory:
            x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
            h = x
            for layer in stack:
                h = recollect.checkpoint(layer, h, source=source)
            return memory.current_bytes, h.sum()

    one = 64 * 32 * 8
    counts = {source: kept(source)[0] // one for source in (Kept(), Previous(1), Previous(4), Previous())}
    # The inputs that are kept, and the output that is returned.
    assert list(counts.values()) == [13, 13, 4, 2]


def test_every_function_runs_once_more():
    runs = []

    def function(i, h):
        runs.append(i)
        return h.sin()

    h = torch.randn(3, requires_grad=True)
    for i in range(6):
        h = recollect.checkpoint(function, i, h, source=Previous(3))
    runs.clear()
    h.sum().backward()
    assert runs == [3, 4, 5, 0, 1, 2]


def test_a_row_may_be_longer_than_the_stack_is_deep():
    x = torch.randn(4, requires_grad=True)
    h = x
    for _ in range(2000):
        h = recollect.checkpoint(torch.tanh, h, source=Previous())
    (found,) = torch.autograd.grad(h.sum(), x)
    h = x
    for _ in range(2000):
        h = h.tanh()
    assert torch.equal(found, torch.autograd.grad(h.sum(), x)[0])


def test_an_input_that_comes_back_with_other_values_is_refused():
    def uneven(x):
        return x.exp() + random.random()  # what autograd saves is the same

    x = torch.randn(4, requires_grad=True)
    h = recollect.checkpoint(torch.clone, x, source=Previous())
    h = recollect.checkpoint(uneven, h, source=Previous())
    h = recollect.checkpoint(torch.sin, h, source=Previous())
    with pytest.raises(RebuildError, match="the frame before it"):
        h.sum().backward()


def test_a_kept_input_that_was_changed_is_refused():
    x = torch.randn(4, requires_grad=True)
    first = x * 1
    h = recollect.checkpoint(torch.sin, first, source=Previous())
    h = recollect.checkpoint(torch.exp, h, source=Previous())
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(InPlaceError):
        h.sum().backward()


def test_leftovers_are_dropped_when_the_next_row_is_rebuilt():
    x = torch.randn(64, 32, requires_grad=True)
    source, h, middles = Previous(2), x, []
    for _ in range(4):
        h = recollect.checkpoint(lambda t: (t.sin() * t.cos()).exp(), h, source=source)
        middles.append(h)
    torch.autograd.grad(h.sum(), x, retain_graph=True)
    first = torch.autograd.grad(h.sum(), x, retain_graph=True)
    again = torch.autograd.grad(h.sum(), x)
    assert torch.equal(first[0], again[0])


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length must be at least 1"):
        Previous(0)
    assert repr(Previous(2)) == "Previous(2)"
