"""The layer written out naively, and the comparison of gradients with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NODES = 7


def couple_naively(convs: Sequence[Any], x: Tensor, graph: Any, *args: Sequence[Any], dim: int = -1) -> Tensor:
    """X'_0 = X_2 + ... + X_C, X'_i = f_i(X'_{i-1}, graph, args_i) + X_i; ``args`` are given block by block."""
    size = x.size(dim) // len(convs)
    groups = [x.narrow(dim, i * size, size) for i in range(len(convs))]
    z = torch.zeros_like(groups[0])
    for group in groups[1:]:
        z = z + group
    outputs = []
    for i, conv in enumerate(convs):
        z = conv(z, graph, *(arg[i] for arg in args)) + groups[i]
        outputs.append(z)
    return torch.cat(outputs, dim)


def differentiate(run: Callable[[], Tensor], wrt: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, list[Tensor]]:
    """Run with a seed and return the output and its gradients; what is not used has zeros."""
    torch.manual_seed(seed)
    y = run()
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y.sin() * weights).sum(), list(wrt), allow_unused=True)
    return y.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(wrt, gradients, strict=True)]


def assert_same_training(
    run: Callable[[], Tensor], plain: Callable[[], Tensor], wrt: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """Outputs and gradients of ``run`` are those of ``plain`` to a relative ``tolerance`` for each tensor."""
    expected, wanted = differentiate(plain, wrt)
    output, found = differentiate(run, wrt)
    assert torch.linalg.vector_norm(output - expected) <= tolerance * torch.linalg.vector_norm(expected)
    assert any(bool(w.any()) for w in wanted)
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        error, norm = float(torch.linalg.vector_norm(f - w)), float(torch.linalg.vector_norm(w))
        assert error <= tolerance * norm + 1e-14, f"gradient {i} of shape {list(w.shape)}: {error} of {norm}"


@pytest.fixture(name="naive")
def _naive() -> Callable[..., Tensor]:
    return couple_naively


@pytest.fixture(name="same_training")
def _same_training() -> Callable[..., None]:
    return assert_same_training


@pytest.fixture
def edge_index() -> Tensor:
    """A ring of six nodes with a chord and a self-loop; node 6 is isolated."""
    return torch.tensor([[0, 1, 2, 3, 4, 5, 0, 3, 2], [1, 2, 3, 4, 5, 0, 3, 0, 2]])


@pytest.fixture
def features() -> Callable[..., Tensor]:
    def make(channels: int, rows: int = NODES, grad: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(11)
        return torch.randn(rows, channels, dtype=torch.float64, generator=generator).requires_grad_(grad)

    return make


class Block(nn.Module):
    """norm or dropout or whatever is given, after a linear layer and a mean over the neighbours."""

    def __init__(self, channels: int, *after: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.after = nn.Sequential(*after)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, x: Tensor, edge_index: Any, *args: Any) -> Tensor:
        h = self.after(self.linear(x)).tanh()
        if edge_index is None:
            return h
        out = torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])
        for arg in args:
            if isinstance(arg, Tensor):
                out = out * (arg if arg.shape == out.shape else arg.mean())
        return out


@pytest.fixture
def block() -> type[Block]:
    return Block
