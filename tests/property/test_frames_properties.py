"""Gradients through frames equal plain autograd's for random shapes, depths, groups and draws."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recollect
from recollect.frames import couple, uncouple

few = settings(derandomize=True, max_examples=30, deadline=None)
Shape = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))


class Block(nn.Module):
    """Elementwise and mixing steps along every dimension, whatever the shape."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(()) + 0.5), nn.Parameter(torch.randn(()))
        self.dropout = nn.Dropout(rate)

    def forward(self, z: Tensor, w: Tensor | None = None) -> Tensor:
        h = self.dropout(torch.tanh(self.a * z + self.b))
        h = h + 0.3 * z.cumsum(0)
        return h if w is None else h * w


def step(run, inputs, seed):
    grads = []
    for enabled in (False, True):
        torch.manual_seed(seed)
        y = run(enabled)
        after = torch.get_rng_state()
        grads.append((y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), inputs, allow_unused=True)))
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(grads[0][0], grads[1][0])
    for plain, framed in zip(*grads, strict=True):
        assert (plain is None) == (framed is None)
        if plain is not None:
            assert float((plain - framed).norm()) <= 1e-10 * max(
                1e-6, *(float(g.norm()) for g in grads[0] if g is not None)
            )


@few
@given(
    shape=Shape,
    groups=st.integers(2, 4),
    depth=st.integers(1, 5),
    dim=st.integers(-3, 2),
    rate=st.sampled_from([0.0, 0.3, 0.9]),
    anchor_every=st.sampled_from([None, 1, 2, 3]),
    weighted=st.booleans(),
    input_grad=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_couplings(shape, groups, depth, dim, rate, anchor_every, weighted, input_grad, seed):
    torch.manual_seed(seed)
    size = [*shape]
    size[dim] = max(1, size[dim]) * groups
    x = torch.randn(size, dtype=torch.float64, requires_grad=input_grad)
    w = torch.rand((), dtype=torch.float64, requires_grad=True) if weighted else None
    layers = nn.ModuleList(nn.ModuleList(Block(rate) for _ in range(groups)) for _ in range(depth)).double()

    def run(enabled):
        h = x * 1.0
        for layer in layers:
            h = couple(layer, h, [(w,)] * groups, dim=dim, anchor_every=anchor_every, enabled=enabled)
        return h

    step(run, [t for t in (x, w, *layers.parameters()) if t is not None and t.requires_grad], seed)


@few
@given(
    shape=Shape,
    nesting=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31 - 1),
)
def test_nested_checkpoints(shape, nesting, rate, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    blocks = nn.ModuleList(Block(rate) for _ in range(2)).double()

    def level(h, widths, enabled):
        if not widths:
            return blocks[0](blocks[1](h)).sin()
        for _ in range(widths[0]):
            h = recollect.checkpoint(level, h, widths[1:], enabled, enabled=enabled)
        return h.cos()

    step(lambda enabled: level(x, nesting, enabled), [x, *blocks.parameters()], seed)


@few
@given(
    plan=st.lists(st.sampled_from(["checkpoint", "inverse", "coupling", "plain", "branch"]), min_size=1, max_size=7),
    rate=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**31 - 1),
)
def test_mixtures_of_sources_with_branches(plan, rate, seed):
    torch.manual_seed(seed)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    blocks = nn.ModuleList(Block(rate) for _ in range(3)).double()

    def swap(h):
        a, b = h.chunk(2, -1)
        return torch.cat([b + blocks[0](a), a], -1)

    def unswap(y):
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - blocks[0](a)], -1)

    def run(enabled):
        h, out = x * 1.0, x.new_zeros(())
        for kind in plan:
            if kind == "checkpoint":
                h = recollect.checkpoint(blocks[1], h, enabled=enabled)
            elif kind == "inverse":
                h = recollect.checkpoint(swap, h, inverse=unswap, enabled=enabled)
            elif kind == "coupling":
                h = couple(blocks, h, [()] * 3, enabled=enabled)
            elif kind == "plain":
                h = blocks[2](h)
            else:
                out = out + h.sin()
        return h + out

    step(run, [x, *blocks.parameters()], seed)


@few
@given(shape=Shape, groups=st.integers(2, 4), dim=st.integers(-3, 2), seed=st.integers(0, 2**31 - 1))
def test_uncouple_inverts_couple(shape, groups, dim, seed):
    torch.manual_seed(seed)
    size = [*shape]
    size[dim] = max(1, size[dim]) * groups
    x = torch.randn(size, dtype=torch.float64)
    blocks = [Block(0.0).double() for _ in range(groups)]
    args = [()] * groups
    with torch.no_grad():
        back = uncouple(blocks, couple(blocks, x, args, dim=dim), args, dim=dim)
    assert float((back - x).norm()) <= 1e-10 * float(x.norm())
