"""Hazards of what a forward pass does: randomness, changes in place, side effects, control flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._member import WIDTH, Member, member


class Stack(Member):
    """`between` stands between two linear layers."""

    def between(self) -> nn.Module:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 5), self.between(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@member
class Dropout(Stack):
    """Dropout in training: the mask of the Gramian is that of the forward pass."""

    def between(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.4), nn.Linear(5, 5), nn.Dropout(0.4))


class Noisy(nn.Module):
    """A layer with a parameter that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.scale * torch.rand_like(x), 0.3)


@member
class RandomOwner(Stack):
    """A module that owns parameters draws random numbers itself."""

    def between(self) -> nn.Module:
        return Noisy()


@member
class InplaceActivation(Stack):
    """In-place ReLU behind a layer changes that layer's own output."""

    def between(self) -> nn.Module:
        return nn.ReLU(inplace=True)


@member
class InplaceAfterConv(Member):
    """In-place changes of a convolution's output, of a view of it, and of a norm's output."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.unflatten(-1, (2, -1))).mul_(2)
        h[:, :2].add_(1)
        h = self.norm(h).relu_()
        return self.last(h.mean(-1)).clamp_(min=-10)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.features(batch, batch_dim, 12),), {}


@member
class InplaceInputs(Member):
    """Inputs of layers with frozen weights are changed in place behind them: autograd has no need of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += self.second(h).tanh()
        return self.last(h)


class Counter(nn.Module):
    """Keeps count in a buffer and in an attribute, and changes what it computes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(len(x))
        return x * self.scale * self.count


@member
class SideEffects(Stack):
    """Each forward pass changes a buffer, a list, and what the next one computes."""

    def between(self) -> nn.Module:
        return Counter()


@member
class ControlFlow(Member):
    """Which layers are called depends on the values, and some are called in a loop of random length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.even, self.odd = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(torch.randint(3, ()))):
            x = self.first(x).tanh()
        return self.even(x) if float(x.detach().abs().sum()) > 0 else self.odd(x)


@member
class Evaluated(Stack):
    """Everything in evaluation mode: dropout is off, and BatchNorm treats the elements one by one."""

    batch_dims = (0, None)

    def between(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5), nn.PReLU(5))

    def __init__(self) -> None:
        super().__init__()
        norm = self.layers[1][1]
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        self.eval()


@member
class ZeroGradients(Member):
    """Some losses have no gradient, and dead units give whole layers a zero one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * (x[..., :1] > 0))

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output) * (output.detach()[..., 0] > 0)
