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
