"""Small networks over every source of frames, and the comparison of their gradients with plain autograd's."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect.frames import Offload, Previous, couple

SOURCES = ("checkpoint", "inverse", "coupling", "offload", "file", "previous")
# To checkpoint(source=).
GIVEN = {"previous": Previous(), "offload": Offload(), "file": Offload(path=tempfile.gettempdir())}
WIDTH = 12
TOLERANCE = 1e-10

each_source = pytest.mark.parametrize("source", SOURCES)


_CALLS: weakref.WeakKeyDictionary[nn.Module, list[bool]] = weakref.WeakKeyDictionary()


class Block(nn.Module):
    """Linear, tanh, optional normalisation and dropout, linear; counts its calls, and those made in a rebuild."""

    def __init__(self, width: int, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, width)

    @property
    def calls(self) -> list[bool]:
        """Not an attribute: those are put back after a rebuild."""
        return _CALLS.setdefault(self, [])

    def forward(self, z: Tensor) -> Tensor:
        self.calls.append(recollect.in_backward())
        return self.last(self.dropout(torch.tanh(self.norm(self.first(z)))))


class Swap(nn.Module):
    """(a, b) -> (b + f(a), a): invertible, with one evaluation of the block either way."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.block = Block(width // 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.block(a), a], -1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - self.block(a)], -1)


class Net(nn.Module):
    """A stack of layers over one source; ``forward(x, enabled=False)`` is the oracle."""

    def __init__(self, source: str, depth: int = 4, groups: int = 3, width: int = WIDTH, **options: Any) -> None:
        super().__init__()
        self.source = source
        make = {
            "inverse": lambda: Swap(width, **options),
            "coupling": lambda: nn.ModuleList(Block(width // groups, **options) for _ in range(groups)),
        }.get(source, lambda: Block(width, **options))
        self.layers = nn.ModuleList(make() for _ in range(depth))

    def step(self, layer: Any, h: Tensor, enabled: bool, **options: Any) -> Tensor:
        if self.source == "coupling":
            return couple(layer, h, [()] * len(layer), enabled=enabled, **options)
        inverse = layer.inverse if self.source == "inverse" else None
        options = {"source": GIVEN.get(self.source)} | options
        output: Tensor = recollect.checkpoint(layer, h, inverse=inverse, enabled=enabled, **options)
        return output

    def walk(self, x: Tensor, enabled: bool = True, **options: Any) -> Iterator[Tensor]:
        h = x * 1.0
        for layer in self.layers:
            h = self.step(layer, h, enabled, **options)
            yield h

    def forward(self, x: Tensor, enabled: bool = True, **options: Any) -> Tensor:
        h = x * 1.0
        for layer in self.layers:
            h = self.step(layer, h, enabled, **options)
        return h

    @property
    def blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    @property
    def calls(self) -> list[bool]:
        return [call for block in self.blocks for call in block.calls]


def make(source: str, **options: Any) -> tuple[Net, Tensor]:
    """Return a float64 network and its input, always the same ones."""
    torch.manual_seed(0)
    return Net(source, **options).double(), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)


def error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the largest relative error over pairs of tensors; both ``None`` counts as equal.

    Gradients that vanish but for rounding (a bias before BatchNorm) are measured against the largest one.
    """
    worst = 0.0
    floor = 1e-4 * max((float(e.detach().norm()) for e in expected if e is not None), default=0.0)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert a.shape == e.shape
            assert a.dtype == e.dtype
            a, e = a.detach(), e.detach()
            scale = max(float(e.norm()), floor)
            worst = max(worst, float((a - e).norm()) / (scale if scale > 0 else 1.0))
    return worst


def assert_same(
    actual: Sequence[Tensor | None] | Tensor, expected: Sequence[Tensor | None] | Tensor, tolerance: float = TOLERANCE
) -> None:
    if isinstance(actual, Tensor):
        actual = [actual]
    if isinstance(expected, Tensor):
        expected = [expected]
    worst = error(actual, expected)
    assert worst <= tolerance, f"relative error {worst:.2e} > {tolerance:.0e}"


def wanted(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *net.parameters()]


def nothing_left() -> None:
    """Assert that no frame is open in this thread and no hook is installed."""
    assert not recollect.in_backward()
    assert not recollect.in_dry_mode()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
