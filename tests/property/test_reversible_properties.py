"""Random stacks of grouped layers and invertible modules, in random graphs of computation, train as plain ones do."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recollect.reversible import GroupAddRev, InvertibleModule

CHANNELS = 12  # divisible by 2, 3 and 4


class Block(nn.Module):
    """A hazard by name, after a linear layer."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels) if kind == "batch norm" else nn.Identity()
        self.drop = nn.Dropout(0.5) if kind == "dropout" else nn.Identity()
        self.requires_grad_(kind != "frozen")
        self.kind = kind

    def forward(self, x: Tensor, graph: Tensor, weight: Tensor | None) -> Tensor:
        if self.kind == "no parameters":
            return graph @ x.sin()
        x = graph @ self.drop(self.norm(self.linear(x))).tanh()
        return x if weight is None else x * weight


class Stretch(InvertibleModule):
    """An invertible module among the grouped ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.8, 1.2, CHANNELS))

    def _forward(self, x: Tensor, *_: Any) -> Tensor:
        return (x * self.scale).asinh()

    def _inverse(self, y: Tensor, *_: Any) -> Tensor:
        return y.sinh() / self.scale


KINDS = st.sampled_from(["linear", "dropout", "batch norm", "frozen", "no parameters"])
LAYERS = st.one_of(
    st.tuples(st.sampled_from([2, 3, 4]), st.lists(KINDS, min_size=4, max_size=4), st.sampled_from([None, 1, 2])),
    st.none(),
)


def build(specification: tuple[int, list[str], int | None] | None) -> nn.Module:
    if specification is None:
        return Stretch()
    groups, kinds, anchor_every = specification
    return GroupAddRev(
        nn.ModuleList(Block(CHANNELS // groups, kind) for kind in kinds[:groups]), anchor_every=anchor_every
    )


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, str]]:
    """Steps (layer, which earlier value it takes, what happens to its output), layers may be used again."""
    count = draw(st.integers(1, 4))
    steps = []
    for step in range(draw(st.integers(1, 6))):
        behind = draw(st.sampled_from([0, 0, 0, 1, 2]))  # most often the last value, sometimes an older one
        after = draw(st.sampled_from(["", "", "", "skip", "scale", "view", "detach"]))
        steps.append((draw(st.integers(0, count - 1)), max(step - behind, 0), after))
    return steps


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    specifications=st.lists(LAYERS, min_size=4, max_size=4),
    program=programs(),
    read=st.sets(st.integers(1, 6)),
    weighted=st.booleans(),
    x_grad=st.booleans(),
    nodes=st.integers(2, 6),
)
def test_random_programs(specifications, program, read, weighted, x_grad, nodes):
    torch.manual_seed(0)
    layers = nn.ModuleList(map(build, specifications)).double()
    x = torch.randn(nodes, CHANNELS, dtype=torch.float64, requires_grad=x_grad)
    graph = torch.rand(nodes, nodes, dtype=torch.float64, requires_grad=weighted)
    weight = torch.rand(nodes, 1, dtype=torch.float64, requires_grad=True) if weighted else None
    head = torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        values = [x]
        for index, source, after in program:
            before = values[source]
            h = layers[index](before, graph, weight)
            if after == "skip":
                h = h + before
            elif after == "scale":
                h = h * head
            elif after == "view":
                h = h.t().contiguous().t()[:]
            elif after == "detach":
                h = h.detach()
            values.append(h)
        chosen = [value for i, value in enumerate(values) if i in read] + values[-1:]
        del values
        return torch.stack([(value * head).sin().sum() for value in chosen]).sum()

    leaves = [t for t in (x, graph, weight, head, *layers.parameters()) if t is not None and t.requires_grad]
    gradients, states = [], []
    start = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    for disable in (True, False):
        layers.load_state_dict(start, strict=False)
        for layer in layers:
            layer.disable = disable
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(), leaves, allow_unused=True))
        states.append([torch.get_rng_state(), *(buffer.clone() for buffer in layers.buffers())])
    for expected, found in zip(*gradients, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            error = torch.linalg.vector_norm(found - expected)
            assert error <= 1e-10 * torch.linalg.vector_norm(expected) + 1e-12
    for expected, found in zip(*states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.integers(2, 5),
    size=st.integers(1, 4),
    dim=st.integers(-3, 2),
    shape=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_inverse_undoes_forward(groups, size, dim, shape):
    class Wave(nn.Module):
        def forward(self, x: Tensor, graph: None) -> Tensor:
            return (3 * x).sin() + x.flip(0)

    shape[dim] = groups * size
    x = torch.randn(shape, dtype=torch.float64)
    layer = GroupAddRev(Wave(), split_dim=dim, num_groups=groups)
    torch.testing.assert_close(layer.inverse(layer(x, None), None), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(layer.inverse(x, None), None), x, rtol=1e-10, atol=1e-10)
