"""Every strategy on every network, and what stands around a planned model: the gradient is that of plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import recollect
from recollect.autogram import Engine
from recollect.budget import BudgetError, BudgetWarning, Row
from recollect.data._foreign import require
from recollect.frames import settle
from recollect.memory import peak_memory
from recollect.models import RevGNN

require("torch_geometric.data", extra="graph")
STRATEGIES = ["store", "checkpoint", "link", "selective", "offload"]


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)

    def forward(self, x, mask=None):
        h = self.norm(x)
        return x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]


class Gpt(nn.Module):
    """Tied embeddings; its blocks take a mask by name."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, tokens):
        h = self.table(tokens)
        mask = torch.triu(torch.full((5, 5), -torch.inf, dtype=h.dtype), 1)
        for block in self.blocks:
            h = block(h, mask=mask)
        return h @ self.table.weight.T


class Convolutions(nn.Module):
    """BatchNorm, dropout, and functions between the units."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.2))
                                      for _ in range(4)])  # fmt: skip

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x)) + x
        return x.mean((2, 3))


class Twice(nn.Module):
    """One unit is called several times, and several outputs come back."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for _ in range(3):
            for layer in self.layers:
                x = layer(x).tanh()
        return {"sum": x.sum(), "rows": [x, x * 2]}


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = RevGNN(6, 8, 3, 4, conv="sage", dropout=0.2)
        self.register_buffer("edges", torch.randint(20, (2, 60), generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return self.net(x, self.edges)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


NETWORKS = {
    "gpt": (Gpt, lambda: torch.arange(15).view(3, 5) % 11),
    "convolutions": (Convolutions, lambda: numbers(4, 3, 6, 6)),
    "twice": (Twice, lambda: numbers(5, 6)),
    "recurrent": (lambda: nn.Sequential(*[Recurrent() for _ in range(3)]), lambda: numbers(2, 4, 6)),
    "graph": (Graph, lambda: numbers(20, 6)),
}
each = pytest.mark.parametrize("name", NETWORKS)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


def made(name):
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]
    return network().double(), inputs()


def gradients(model, x):
    """Of all parameters, and the buffers that the step leaves."""
    model = copy.deepcopy(model) if not vars(model).get("forward") else model
    torch.manual_seed(1)
    out = model(x)
    parts = [out] if isinstance(out, torch.Tensor) else [out["sum"], *out["rows"]]
    model.zero_grad()
    sum(part.sin().sum() for part in parts).backward()
    settle()
    return [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for ours, plain in zip(one, other, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def forced(plan, strategy):
    """The plan with one strategy for all of its units."""
    plan.rows = tuple(Row(r.unit, r.keeps, strategy, r.bytes, r.seconds) for r in plan.rows)
    return plan


@each
@pytest.mark.parametrize("strategy", [*STRATEGIES, "invert"])
def test_gradients_are_plain(name, strategy, tmp_path):
    if strategy == "invert" and name != "graph":
        pytest.skip("its layers have no inverse")
    if strategy == "selective" and name == "recurrent":
        pytest.skip("torch refuses it; a plan does not choose it")
    model, x = made(name)
    expected = gradients(model, x)
    plan = recollect.plan(model, x, budget="1 GB", offload=tmp_path)
    with forced(plan, strategy):
        assert_same(gradients(model, x), expected)
    assert_same(gradients(made(name)[0], x), expected)


@each
@pytest.mark.parametrize("share", [1.0, 0.8, 0.6])
def test_a_plan_holds_on_networks_of_other_shapes(name, share):
    model, x = made(name)
    with peak_memory("cpu") as memory:
        gradients(model, x)
    expected = gradients(made(name)[0], x)
    model = made(name)[0]
    budget = int(memory.peak_bytes * share)
    try:
        plan = recollect.plan(model, x, budget=budget)
    except BudgetError as error:
        least = error.least
        plan = recollect.plan(model, x, budget=max(least, budget + 1))  # which it says that there is
    assert plan.peak <= plan.budget
    with plan:
        assert_same(gradients(model, x), expected)


def test_under_autocast():
    model, x = made("gpt")
    model = model.float()
    plan = recollect.plan(model, x, budget="1 GB", units="blocks.*")
    found = []
    for context in (None, forced(plan, "link")):
        torch.manual_seed(1)
        if context is not None:
            context.apply()
        with torch.autocast("cpu", torch.bfloat16):
            out = model.blocks[0](model.blocks[1](torch.ones(2, 5, 8)))
        found.append(torch.autograd.grad(out.sum(), list(model.blocks[1].parameters())))
    plan.remove()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_gradients_add_up_and_an_engine_counts_losses():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(4)]).double()
    x = numbers(5, 6)
    engine = Engine(model)
    expected = engine.compute_gramian(model(x).square().sum(1))
    for _ in range(2):
        model(x).sum().backward()
    sums = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with forced(recollect.plan(model, x, budget="1 GB"), "link"):
        torch.testing.assert_close(engine.compute_gramian(model(x).square().sum(1)), expected, rtol=1e-10, atol=1e-10)
        for _ in range(2):
            model(x).sum().backward()
    for parameter, plain in zip(model.parameters(), sums, strict=True):
        torch.testing.assert_close(parameter.grad, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("on", ["warn", "raise", "replan"])
def test_larger_inputs_are_tried(on):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(6)])
    small, large = torch.randn(64, 16), torch.randn(256, 16)
    with peak_memory("cpu") as memory:
        model(small).sum().backward()
    model.zero_grad()
    budget = memory.peak_bytes
    plan = recollect.plan(model, small, budget=2 * budget, on_exceed=on)
    with plan:
        model(small).sum().backward()
        model(torch.randn(80, 16)).sum().backward()  # larger, and within the budget
        if on == "raise":
            with pytest.raises(BudgetError, match="a step with inputs of"):
                model(large)
        elif on == "warn":
            with pytest.warns(BudgetWarning, match="plan with the largest inputs"):
                model(large).sum().backward()
        else:
            model.zero_grad(set_to_none=True)
            with peak_memory("cpu") as memory:
                model(large)  # plans again
            with peak_memory("cpu") as memory:
                model(large).sum().backward()
            assert memory.peak_bytes <= plan.budget == 2 * budget


def test_what_torch_refuses_to_keep_is_not_chosen():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(Recurrent(), nn.Linear(6, 6)) for _ in range(3)]).double()
    x = numbers(2, 40, 6)
    plan = recollect.plan(model, x, budget="1 GB")
    assert {row.strategy for row in plan.rows} == {"store"}
    expected = gradients(model, x)
    with recollect.plan(model, x, budget=int(plan.peak * 0.8), units="[0-9]") as plan:
        assert "selective" not in {row.strategy for row in plan.rows}
        assert_same(gradients(model, x), expected)


def test_inputs_of_as_many_bytes_and_another_shape_are_tried():
    """Attention takes the square of the length, not the bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Attention() for _ in range(3)])
    plan = recollect.plan(model, torch.randn(64, 4, 8), budget="1 GB")
    budget = plan.peak
    with recollect.plan(model, torch.randn(64, 4, 8), budget=budget, on_exceed="raise"):
        model(torch.randn(16, 4, 8)).sum().backward()  # smaller in each dimension
        with pytest.raises(BudgetError, match="a step with inputs of"):
            model(torch.randn(1, 256, 8))


def test_a_share_of_the_machine():
    model, x = made("twice")
    plan = recollect.plan(model, x, budget="1%")
    assert plan.budget > 1_000_000
    with pytest.raises(ValueError, match="budget"):
        recollect.plan(model, x, budget="a lot")
