"""Hazards of what a module returns: its input, views, what the user's hooks make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._member import WIDTH, Member, member


class Passer(nn.Module):
    """Returns its input itself beside something computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scale * self.layer(x)


@member
class ReturnsItsInput(Member):
    """An output is the input itself, unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.passer, self.again = nn.Linear(WIDTH, WIDTH), Passer(), Passer()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.passer(self.first(x))
        y, z = self.again(y)
        return x * y + z


class Splitter(nn.Module):
    """Returns views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x) + self.shift).chunk(2, -1)


@member
class ReturnsViews(Member):
    """Several outputs are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.splitter, self.last = Splitter(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.splitter(x)
        return self.last(a * b.tanh())


@member
class LayerIsLoss(Member):
    """The losses are what a layer returns, as it is: its gradient is the output's."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(400, 4)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.features(batch, batch_dim, 400),), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def losses(self, output: Tensor) -> Tensor:
        return output


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A user's hook."""
    return 2 * output


@member
class UserHooks(Member):
    """The user's own hooks change inputs and outputs of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.first.register_forward_hook(double)
        self.last.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))
