"""Hazards of who uses a parameter: a parent, two modules, one module several times; and odd parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ._member import WIDTH, Member, member


@member
class DirectParameters(Member):
    """A parent uses parameters of its own before, between and behind its children."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.rand(WIDTH))
        self.between = nn.Parameter(torch.rand(4, 4))
        self.behind = nn.Parameter(torch.rand(3))
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x * self.before).tanh() @ self.between
        return self.last(h) * self.behind


@member
class ChildsWeight(Member):
    """A parent uses its child's parameters and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.child.weight, self.child.bias).tanh())


@member
class CalledAndUsed(Member):
    """A child is called, and its weight also used by the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.child(x).tanh()
        return self.last(h + F.linear(x.sin(), self.child.weight)) + self.child.bias[:3]


@member
class NoBias(Member):
    """Layers without bias, linear and convolution."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Linear(WIDTH, 8, bias=False), nn.Conv1d(2, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x).tanh().unflatten(-1, (2, 4))).flatten(1)


@member
class ScalarParameter(Member):
    """A parameter without dimensions, and one of a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.one = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) / self.temperature).tanh() + self.one


@member
class OnlyScalar(Member):
    """The whole network is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).tanh()


@member
class BareParameter(Member):
    """The losses are a parameter, which nothing was done to."""

    batch_dims = (0, None)
    batches = (3,)
    aligned = False

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.values

    def losses(self, output: Tensor) -> Tensor:
        return output


class Mixture(nn.Module):
    """Softmax over lists of parameters: of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(WIDTH, 3) for _ in range(3))
        self.gate = nn.ParameterDict({"logits": nn.Parameter(torch.rand(3))})

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.gate["logits"] * x[..., :3]).softmax(-1)
        return torch.einsum("...i,kio,...k->...o", x, torch.stack(list(self.weights)), gate)


@member
class CustomModule(Member):
    """Modules of no known kind, with lists and dictionaries of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixture = nn.Linear(WIDTH, WIDTH), Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture(self.first(x).tanh())


class Scaled(nn.Linear):
    """A linear layer that is none."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.weight.mean()) + self.weight.square().sum()


class Plain(nn.Linear):
    """A linear layer by another name."""


@member
class OverriddenForward(Member):
    """A subclass of a known layer overrides forward; another one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Scaled(WIDTH, 4), Plain(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@member
class PatchedForward(Member):
    """The forward of one instance was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        layer = self.first
        layer.forward = lambda x: F.linear(x.sin(), layer.weight.square(), layer.bias)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@member
class Parametrized(Member):
    """The weights of known layers are computed from other parameters; each look at one runs an iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(WIDTH, 4))
        self.between = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.last = parametrizations.orthogonal(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()).tanh())
