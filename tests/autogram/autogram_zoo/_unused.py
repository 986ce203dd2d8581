"""Hazards of what does not count: frozen, unused or detached parts, and what is outside the modules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._member import WIDTH, Member, member


class Namer(nn.Module):
    """Has a parameter, and no tensor comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> str:
        return f"{x.dim()} dimensions"


@member
class NoTensorOutput(Member):
    """A module with parameters returns a string, and one returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.namer, self.layer = Namer(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * len(self.namer(x))


@member
class UnusedParameters(Member):
    """A layer is never called, and a parameter never used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.lonely = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@member
class NoElements(Member):
    """The weight of a layer that gives nothing, and of one that takes nothing, have no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is nothing to initialise
            self.narrow, self.wide = nn.Linear(4, 0, bias=False), nn.Linear(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.wide(self.narrow(h)))


@member
class CalledInVain(Member):
    """A layer is called and its output thrown away; another one's is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.vain, self.cut = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.vain(x)
        with torch.no_grad():
            gate = self.vain(x)
        return self.used(x) * self.cut(x).detach() + gate


@member
class FrozenBranch(Member):
    """A branch has no trained parameters, and lies before and beside trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(WIDTH, 4).requires_grad_(False), nn.Linear(WIDTH, 4)
        self.late, self.last = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.late(self.trained(x)) * self.frozen(x).tanh())


@member
class HalfFrozen(Member):
    """Of one layer the weight is frozen, of another the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.first.weight.requires_grad_(False)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@member
class SeveralModules(Member):
    """The Gramian is over two modules of three: gradients pass through the third, which does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def targets(self) -> list[nn.Module]:
        return [self.first, self.last]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()).tanh())


@member
class InputsWantGradients(Member):
    """The input requires a gradient itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.features(batch, batch_dim).requires_grad_(),), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())
