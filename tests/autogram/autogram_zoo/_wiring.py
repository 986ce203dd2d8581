"""Hazards of how modules are put together: branches, several inputs and outputs, what is frozen or unused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._member import WIDTH, Member, member


@member
class Chain(Member):
    """No hazard: layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@member
class Branches(Member):
    """Two branches of different depth from one input, joined by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(WIDTH, 3)
        self.long = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) * self.long(x)


@member
class Residuals(Member):
    """The output of one layer is used by several others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Meet(nn.Module):
    """Two inputs, two outputs, and parameters under both."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(left, 4), nn.Linear(right, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.left(a), self.right(b)
        return a * b, a.sigmoid()


@member
class TwoInputs(Member):
    """A module with several inputs and several outputs, all of them used."""

    def __init__(self) -> None:
        super().__init__()
        self.meet = Meet(WIDTH, 4)
        self.again = Meet(4, 4)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.features(batch, batch_dim), self.features(batch, batch_dim, 4)), {}

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.again(*self.meet(a, b))

    def losses(self, output: Any) -> Tensor:
        return super().losses(output[0]) + output[1].sum(-1)


@member
class UnusedOutput(TwoInputs):
    """One of a module's outputs does not reach the losses."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kept, _ = self.meet(a, b)
        return self.again(kept, b)

    def losses(self, output: Any) -> Tensor:
        return Member.losses(self, output[1])


class Nest(nn.Module):
    """Tensors inside lists and dictionaries, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, nest: dict[str, Any]) -> dict[str, Any]:
        first, (second, _) = nest["first"], nest["rest"]
        return {"sum": self.layer(first + second), "rest": [(self.scale * self.layer(first).tanh(), "a word", None)]}


@member
class Pytrees(Member):
    """Inputs and outputs are nested dictionaries, lists and tuples that hold other things than tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.nest = Nest()

    def forward(self, x: Tensor) -> Tensor:
        output = self.nest({"first": x, "rest": [2 * x, 3]})
        return output["sum"] * output["rest"][0][0]


class Options(nn.Module):
    """Everything by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor, *, other: Tensor, shift: Tensor | None = None, power: int = 1) -> Tensor:
        y = self.layer(input1=x, input2=other) ** power
        return y if shift is None else y + shift


@member
class Keywords(Member):
    """Inputs are handed over by keyword, to a layer with a rule as well."""

    def __init__(self) -> None:
        super().__init__()
        self.options, self.layer = Options(), nn.Linear(3, 4)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        x = self.features(batch, batch_dim)
        return (), {"x": x, "other": x.cos(), "power": 2}

    def forward(self, x: Tensor, other: Tensor, power: int) -> Tensor:
        return self.layer(input=self.options(x, other=other, shift=None, power=power))
