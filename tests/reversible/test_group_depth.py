"""Deep stacks: exact gradients where the blocks are normalised, and a word of it where they are not."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.frames import DriftWarning
from recollect.reversible import GroupAddRev

DEPTH = 112


class Raw(nn.Module):
    """A block without normalisation, strong enough for the residual stream to grow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        return self.linear(x).relu()


def stack(**options: Any) -> tuple[nn.ModuleList, Tensor]:
    torch.manual_seed(0)
    layers = nn.ModuleList(GroupAddRev(nn.ModuleList([Raw(4), Raw(4)]), **options) for _ in range(DEPTH))
    return layers, torch.randn(20, 8)


def error(layers: nn.ModuleList, x: Tensor) -> tuple[float, list[str]]:
    """Relative gradient error against plain autograd, and the drift warnings."""
    gradients, messages = [], []
    for disable in (True, False):
        for layer in layers:
            layer.disable = disable
        h = x
        for layer in layers:
            h = layer(h, None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            gradients.append(torch.autograd.grad(h.square().mean().log(), list(layers.parameters())))
        messages = [str(w.message) for w in caught if issubclass(w.category, DriftWarning)]
    plain, found = (torch.cat([g.flatten() for g in gs]).double() for gs in gradients)
    return float((found - plain).norm() / plain.norm()), messages


def test_raw_stack_warns_and_names_the_remedies():
    layers, x = stack()
    off, messages = error(layers, x)
    assert off > 1e-2  # the hazard is there
    assert len(messages) == 1
    for remedy in ("GroupAddRev", "anchor_every=s", "normalise", "float64", "checkpoint"):
        assert remedy in messages[0]
    drift = float(re.search(r"relative error of (\S+)", messages[0])[1])
    assert layers[0].last_drift == pytest.approx(drift, rel=0.06)
    assert layers[0].last_drift > 1e-3
    assert [layer.last_drift for layer in layers[1:]] == [None] * (DEPTH - 1)


def test_anchors_bound_the_drift():
    layers, x = stack(anchor_every=4)
    off, messages = error(layers, x)
    assert messages == []
    assert off < 1e-5
    drifts = {i: layer.last_drift for i, layer in enumerate(layers) if layer.last_drift is not None}
    assert list(drifts) == list(range(0, DEPTH, 4))
    assert all(drift < 1e-4 for drift in drifts.values())


def test_float64_bounds_it_too():
    layers, x = stack()
    off, messages = error(layers.double(), x.double())
    assert off < 1e-3 or messages


def test_drift_is_the_error_of_the_reconstruction():
    """The figure is of the size of the error that inverting layer by layer makes."""
    layers, x = stack()
    h = x[:2].clone()
    outputs = []
    for layer in layers[:16]:
        h = layer(h, None)
        outputs.append(h.detach())
    h.sum().backward()
    drift = layers[0].last_drift
    back = outputs[-1]
    with torch.no_grad():
        for layer in reversed(layers[:16]):
            back = layer.inverse(back, None)
    true = float((back - x[:2]).norm() / x[:2].norm())
    assert math.isfinite(true)
    assert true / 10 < drift < true * 10


def test_no_drift_before_the_first_backward():
    layers, x = stack(anchor_every=8)
    layer = layers[0]
    assert layer.last_drift is None
    y = layer(x, None)
    assert layer.last_drift is None
    y.sum().backward()
    assert 0 <= layer.last_drift < 1e-5


@pytest.mark.parametrize("call", ["forward", "inverse"])
def test_drift_of_the_last_backward_outlives_an_evaluation(call):
    layers, x = stack()
    layers[0](x, None).sum().backward()
    drift = layers[0].last_drift
    with torch.no_grad():
        getattr(layers[0], call)(x, None)
    assert layers[0].last_drift == drift


def test_not_a_number_warns():
    x = torch.randn(20, 8, requires_grad=True)

    class Overflow(nn.Module):
        def forward(self, x: Tensor, graph: Any) -> Tensor:
            return (x * 1e38).exp()

    layer = GroupAddRev(Overflow(), num_groups=2)
    with pytest.warns(DriftWarning, match="relative error of (nan|inf)"):
        layer(x, None).sum().backward()


def test_measuring_does_not_move_the_random_numbers():
    layers, x = stack()
    torch.manual_seed(0)
    layers[0](x, None).sum().backward()
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())
