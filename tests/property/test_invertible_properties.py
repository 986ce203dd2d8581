"""Gradients of invertible modules equal plain autograd's, for generated modules, chains, shapes, seeds and groups.

Cases: 900 chains of the zoo's hazards, 300 of single modules with all flags, 500 of grouped couplings (200 of them
graph couplings), 400 chains of the library's modules; 2,100 in all, which `test_the_number_of_cases` adds up.
"""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import recollect.invertible as inn
from recollect.frames import couple
from recollect.reversible import GroupAddRev
from recollect.testing._zoo import ZOO

CASES = {"zoo": 900, "flags": 300, "couplings": 300, "graphs": 200, "library": 400}

Seed = st.integers(0, 2**31 - 1)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.complex128: 1e-10}


def cases(name):
    return settings(derandomize=True, max_examples=CASES[name], deadline=None, database=None)


def test_the_number_of_cases():
    assert sum(CASES.values()) >= 2000


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def set_plain(module: nn.Module, off: bool) -> None:
    for part in module.modules():
        if isinstance(part, inn.Module):
            part.checkpoint, part.invertible = not off, not off


def compare(run, wanted, seed, dtype=torch.float64):
    """Compare ``run(plain=False)``, which returns outputs, with ``run(plain=True)``."""
    results = []
    for plain in (True, False):
        torch.manual_seed(seed)
        outputs = [t for t in as_tuple(run(plain)) if isinstance(t, Tensor) and t.requires_grad]
        after = torch.get_rng_state()
        loss = sum((t * t.detach().cos()).sum() * (i + 1) for i, t in enumerate(outputs))
        results.append(([t.detach() for t in outputs], torch.autograd.grad(loss, wanted, allow_unused=True)))
        assert torch.equal(torch.get_rng_state(), after)
    (before, expected), (outputs, found) = results
    assert len(before) == len(outputs)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs, strict=True))
    floor = 1e-4 * max((float(e.norm()) for e in expected if e is not None), default=0.0)
    for e, f in zip(expected, found, strict=True):
        assert (e is None) == (f is None)
        if e is not None:
            assert float((e - f).norm()) <= TOLERANCE[dtype] * max(float(e.norm()), floor)


def trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def cast(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg


@cases("zoo")
@given(
    names=st.lists(st.sampled_from(sorted(ZOO)), min_size=1, max_size=6),
    batch=st.integers(2, 4),
    channels=st.integers(1, 4),
    use=st.sampled_from(["end", "branches", "held", "first output", "shared module"]),
    anchor_every=st.sampled_from([None, None, 1, 2, 3]),
    in_sequential=st.booleans(),
    seed=Seed,
)
def test_chains_of_hazards(names, batch, channels, use, anchor_every, in_sequential, seed):
    torch.manual_seed(seed)
    made = [ZOO[name](channels) for name in names]
    modules = nn.ModuleList(module for module, _ in made).double()
    for module in modules:
        module.anchor_every = anchor_every
    if use == "shared module":
        modules.append(modules[0])
        made.append(made[0])
    extra = [[cast(a, torch.float64) for a in make(batch)[2:]] for _, make in made]
    a, b = leaf(batch, channels), leaf(batch, channels)

    def run(plain):
        set_plain(modules, plain)
        h, seen = (a * 1.0, b * 1.0), []
        for module, more in zip(modules, extra, strict=True):
            layer = inn.Sequential(module) if in_sequential else module
            if plain:
                set_plain(layer, True)
            h = layer(*h[:2], *more)
            if use in ("branches", "held"):
                seen.append([t * 1.0 for t in h[:2]] if use == "branches" else h)
        return tuple(t for outputs in (*seen, h[:1] if use == "first output" else h) for t in outputs)

    compare(run, [a, b, *trainable(modules)], seed)


@cases("flags")
@given(
    name=st.sampled_from(sorted(ZOO)),
    batch=st.integers(2, 3),
    mode=st.sampled_from(["checkpoint", "training", "evaluation", "keep", "reversed", "frozen", "no input grad"]),
    passes=st.integers(1, 3),
    seed=Seed,
)
def test_single_modules(name, batch, mode, passes, seed):
    torch.manual_seed(seed)
    module, make = ZOO[name](3)
    module.double().train(mode != "evaluation")
    if mode == "reversed" and module.reversible:
        module.reverse()
    if mode == "frozen":
        module.requires_grad_(False)
    args = [cast(a, torch.float64) for a in make(batch)]
    for arg in args[: 1 if mode == "no input grad" else 2]:
        arg.requires_grad_()
    wanted = [t for t in (*args[:2], *module.parameters()) if t.requires_grad]

    def run(plain):
        set_plain(module, plain)
        if mode == "checkpoint" and not plain:
            module.invertible = False
        first, second = args[0] * 1.0, args[1] * 1.0
        return module(first, second, *args[2:], keep=(first,) if mode == "keep" else ())

    compare(run, wanted, seed)
    set_plain(module, False)
    torch.manual_seed(seed)
    outputs = [t for t in module(args[0] * 1.0, args[1] * 1.0, *args[2:]) if isinstance(t, Tensor) and t.requires_grad]
    loss = sum(t.sin().sum() for t in outputs)
    first = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    for i in range(1, passes):
        again = torch.autograd.grad(loss, wanted, retain_graph=i + 1 < passes, allow_unused=True)
        assert all(f is g or torch.equal(f, g) for f, g in zip(first, again, strict=True))


class Block(nn.Module):
    """Elementwise and mixing steps, whatever the shape, with an optional further argument."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(()) + 0.5), nn.Parameter(torch.randn(()))
        self.dropout = nn.Dropout(rate)

    def forward(self, z: Tensor, edge_index: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        # Bounded: what grows over the layers would be inverted to fewer digits.
        h = self.dropout(torch.tanh(self.a * z + self.b + 0.3 * z.cumsum(0)))
        if edge_index is not None:
            h = torch.sin(torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]) - h)
        return h if weight is None else h * torch.sigmoid(weight)


@cases("couplings")
@given(
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    groups=st.integers(2, 4),
    depth=st.integers(1, 6),
    rate=st.sampled_from([0.0, 0.0, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    anchor_every=st.sampled_from([None, 2]),
    seed=Seed,
)
def test_grouped_couplings(shape, groups, depth, rate, dtype, anchor_every, seed):
    torch.manual_seed(seed)
    dim = seed % len(shape)
    x = leaf(*(max(n, 1) * groups if i == dim else n for i, n in enumerate(shape)), dtype=dtype)
    layers = nn.ModuleList(nn.ModuleList(Block(rate) for _ in range(groups)) for _ in range(depth)).to(dtype)

    def run(plain):
        h = x * 1.0
        for layer in layers:
            h = couple(layer, h, [()] * groups, dim=dim, anchor_every=anchor_every, enabled=not plain)
        return h

    compare(run, [x, *layers.parameters()], seed, dtype)


@cases("graphs")
@given(
    nodes=st.integers(1, 4),
    groups=st.integers(2, 4),
    depth=st.integers(1, 4),
    weighted=st.booleans(),
    rate=st.sampled_from([0.0, 0.4]),
    seed=Seed,
)
def test_graph_couplings(nodes, groups, depth, weighted, rate, seed):
    torch.manual_seed(seed)
    x, weight = leaf(nodes, groups), leaf(nodes, 1)
    edges = torch.randint(0, nodes, (2, nodes))
    blocks = [nn.ModuleList(Block(rate) for _ in range(groups)) for _ in range(depth)]
    layers = nn.ModuleList(GroupAddRev(block) for block in blocks).double()

    def run(plain):
        h = x * 1.0
        for layer in layers:
            layer.disable = plain
            h = layer(h, edges, *([weight] if weighted else []))
        return h

    compare(run, [x, weight, *layers.parameters()], seed)


class Net(nn.Module):
    """The block of a coupling, from ``size`` to ``factor * size`` features."""

    def __init__(self, size: int, factor: int, rate: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(size, factor * size), nn.Dropout(rate)

    def forward(self, z: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(z)))


# By name, so that the chains grow with what the library exports: each takes and returns [batch, 2 * half].
LIBRARY = {
    "Identity": lambda half, rate: inn.Identity(),
    "Sequential": lambda half, rate: inn.Sequential(inn.Identity(), inn.Sequential()),
    "AdditiveCoupling": lambda half, rate: inn.AdditiveCoupling(Net(half, 1, rate), Net(half, 1, rate)),
    "AffineCoupling": lambda half, rate: inn.AffineCoupling(Net(half, 2, rate), Net(half, 2, rate)),
    "Linear": lambda half, rate: inn.Linear(2 * half, 2 * half),
    "BatchNorm1d": lambda half, rate: inn.BatchNorm1d(2 * half),
    "ActNorm": lambda half, rate: inn.ActNorm(2 * half),
    "Permute": lambda half, rate: inn.Sequential(inn.Permute(1, 0), inn.Permute(1, 0)),
}


@cases("library")
@given(
    names=st.lists(st.sampled_from([name for name in LIBRARY if hasattr(inn, name)]), min_size=1, max_size=6),
    batch=st.integers(4, 7),
    half=st.integers(1, 2),
    rate=st.sampled_from([0.0, 0.4]),
    reverse=st.lists(st.booleans(), min_size=6, max_size=6),
    mode=st.sampled_from(["chain", "Sequential", "one checkpoint", "evaluation"]),
    seed=Seed,
)
def test_chains_of_the_library(names, batch, half, rate, reverse, mode, seed):
    torch.manual_seed(seed)
    modules = [LIBRARY[name](half, rate) for name in names]
    for module, turned in zip(modules, reverse, strict=False):
        if turned and module.reversible:
            module.reverse()
    net = (nn.Sequential if mode == "chain" else inn.Sequential)(*modules).double()
    x = leaf(batch, 2 * half)
    with torch.no_grad():
        net(x)  # what initialises itself from data does so here
    net.train(mode != "evaluation")

    def run(plain):
        set_plain(net, plain)
        if mode == "one checkpoint" and not plain:
            net.invertible = False
        return net(x * 1.0)

    compare(run, [x, *trainable(net)], seed)
