"""On devices that are not waited for, what is rebuilt is judged when backward ends."""

import random
from dataclasses import replace

import pytest
import torch
from frames_zoo import assert_same, each_source, make, wanted
from torch import nn

import recollect
from recollect._devices import FORMS
from recollect.frames import RebuildError, _certificate, _fingerprint, couple


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """Take the CPU for a device of which no value is to be read on the way."""
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], reads_at_once=False))


@each_source
def test_what_is_the_same_is_accepted(source):
    net, x = make(source, dropout=0.3)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sin().sum(), wanted(net, x))
    torch.manual_seed(1)
    assert_same(torch.autograd.grad(net(x).sin().sum(), wanted(net, x)), expected)


def noisy(h):
    return h * (1 + random.random())


@pytest.mark.parametrize("source", ["checkpoint", "inverse", "coupling"])
@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
def test_what_is_not_is_refused_when_backward_ends(source):
    lin = nn.Linear(4, 4, dtype=torch.float64)
    x = torch.randn(5, 8 if source == "coupling" else 4, dtype=torch.float64, requires_grad=True) * 1
    if source == "coupling":
        y = couple([lambda h: noisy(lin(h)).tanh(), torch.sin], x, [(), ()])
    elif source == "inverse":
        y = recollect.checkpoint(lambda h: noisy(h).exp(), x, inverse=torch.log)
        del x
    else:
        y = recollect.checkpoint(lambda h: noisy(lin(h)).tanh(), x)
    with pytest.raises(RebuildError, match="differs from the forward pass"):
        y.square().sum().backward()
    recollect.checkpoint(torch.sin, torch.ones(3, requires_grad=True)).sum().backward()  # the next one is its own


def test_no_value_is_read_on_the_way(monkeypatch):
    read = []
    original = _fingerprint.error_between
    monkeypatch.setattr(
        _certificate, "error_between", lambda a, b: read.append(recollect.in_backward()) or original(a, b)
    )
    net, x = make("checkpoint", depth=3)
    order = []
    net.layers[0].register_full_backward_hook(lambda *_: order.append(len(read)))
    net(x).sin().sum().backward()
    assert order == [0]  # the first layer's gradient came before any verdict
    assert read
    assert not any(read)
