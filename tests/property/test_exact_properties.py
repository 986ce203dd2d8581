"""Exact streams of random networks are plain ones, bit for bit."""

from __future__ import annotations

import contextlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recollect.reversible import BDIA, GroupAddRev, Midpoint

HAZARDS = st.sampled_from(["linear", "layer norm", "batch norm", "dropout", "frozen", "no parameters", "zero", "large"])


class Block(nn.Module):
    """A hazard by name, after a linear layer."""

    def __init__(self, channels: int, hazard: str) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        norms = {"layer norm": nn.LayerNorm, "batch norm": nn.BatchNorm1d}
        self.norm = norms.get(hazard, lambda _: nn.Identity())(channels)
        self.dropout = nn.Dropout(0.5 if hazard == "dropout" else 0.0)
        self.requires_grad_(hazard != "frozen")
        self.hazard = hazard

    def forward(self, x: Tensor, *_: None) -> Tensor:
        if self.hazard == "no parameters":
            return x.sin()
        scale = {"zero": -0.0, "large": 8.0}.get(self.hazard, 1.0)
        return scale * self.dropout(self.norm(self.linear(x))).tanh()


class Stack(nn.Module):
    """Grouped layers, or a stack at full width."""

    def __init__(self, kind: str, groups: int, width: int, hazards: list[str], exact: int, anchor: int | None) -> None:
        super().__init__()
        options = {"exact": exact, "anchor_every": anchor}
        if kind == "grouped":
            self.layers = nn.ModuleList(
                GroupAddRev(nn.ModuleList(Block(width, hazard) for _ in range(groups)), **options) for hazard in hazards
            )
        else:
            make = {"midpoint": Midpoint, "bdia": BDIA}[kind]
            self.layers = nn.ModuleList([make([Block(width * groups, hazard) for hazard in hazards], **options)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return x


@given(
    st.sampled_from(["grouped", "midpoint", "bdia"]),
    st.integers(2, 4),
    st.integers(1, 5),
    st.lists(HAZARDS, min_size=1, max_size=6),
    st.integers(1, 14),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([None, torch.bfloat16, torch.float16]),
    st.integers(2, 9),
    st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_gradients_bit_for_bit(same_bits, kind, groups, width, hazards, exact, anchor, blocks, rows, seed):
    torch.manual_seed(seed)
    net = Stack(kind, groups, width, hazards, exact, anchor)
    x = torch.randn(rows, width * groups, requires_grad=True)
    results = []
    with contextlib.nullcontext() if blocks is None else torch.autocast("cpu", blocks):
        for disable in (False, True):
            for layer in net.layers:
                layer.disable = disable
            torch.manual_seed(seed)
            y = net(x)
            assert torch.equal(y, (y * 2**exact).round() / 2**exact)
            wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
            results.append([y.detach(), *torch.autograd.grad((y * y.sin()).sum(), wanted, allow_unused=True)])
    same_bits(*results)
    assert not any(bool((g.eq(0) & g.signbit()).any()) for g in results[0][:1])
