"""Hazards of parameters that no layer holds: products, slices and sums of them, penalties, hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._member import WIDTH, Member, member


@member
class WeightSlices(Member):
    """Slices of a weight and of a bias are used, and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        return F.linear(x, weight[1:4], bias[1:4]) @ weight[:3, ::2] + self.layer(x)[..., :3]


@member
class WeightTransforms(Member):
    """Weights are masked, concatenated, transposed, normalised and added before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.narrow = nn.Parameter(torch.rand(WIDTH, WIDTH)), nn.Parameter(torch.rand(WIDTH, 2))
        self.flat = nn.Parameter(torch.rand(WIDTH * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([self.narrow, 2 * self.narrow, self.narrow.sin()], 1)
        h = (x @ self.square.tril() + x @ wide).tanh()
        flat = self.flat.view(WIDTH, WIDTH)
        return h @ flat.T + h @ F.normalize(self.square, dim=0) + h @ (self.square + flat)


@member
class LeftWeights(Member):
    """Weights stand to the left of the features, and are multiplied with each other and themselves."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.rand(4, WIDTH)), nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.last @ (self.first @ x.T).tanh() + self.last @ self.last.T @ self.first @ x.T).T


@member
class ScaledSums(Member):
    """Products with factors: addmm with alpha and beta, a bias that is broadcast in two ways."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, 4))
        self.bias, self.row = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        left = torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=3.0)
        return left * torch.addmm(self.row, x, self.weight, beta=2, alpha=-1)


@member
class BatchedWeights(Member):
    """Weights for several heads, in one tensor, and vectors."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.vector = nn.Parameter(torch.rand(3, WIDTH, 4)), nn.Parameter(torch.rand(WIDTH))
        self.left, self.right = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,hio->bho", x, self.heads).tanh().flatten(1)
        return y * (x @ self.vector + x @ torch.outer(self.left, self.right) @ self.vector)[:, None] + self.left.dot(
            self.right
        )


@member
class FunctionalConvolutions(Member):
    """Convolutions by function, with the weight of a layer and without any layer."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(2, 3, 2)), nn.Parameter(torch.rand(2))

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.features(batch, batch_dim, 12),), {}

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x.unflatten(1, (2, 6)), self.conv.weight, self.conv.bias, stride=2)
        return F.conv1d(h.tanh(), self.weight, self.bias).flatten(1)


class Product(torch.autograd.Function):
    """A matrix product of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


@member
class CustomFunction(Member):
    """A parameter goes into an autograd function of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.rand(WIDTH, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(Product.apply(x, self.weight).tanh())


@member
class ComplexNumbers(Member):
    """Complex numbers behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(self.layer(x)) * (1 + 2j)).real


@member
class Penalty(Member):
    """Every loss has the same penalty on all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output) + 0.1 * sum(p.square().sum() for p in self.parameters())


@member
class GradientPenalty(Member):
    """The losses hold the gradients of others: the graph of a backward pass is part of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.last(self.first(x).tanh())
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.cat([y, slope], -1)


@member
class ParameterHook(Member):
    """A hook on a parameter masks its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first.weight._backward_hooks:
            self.first.weight.register_hook(lambda grad: grad.tril())
        return self.last(self.first(x).tanh())


@member
class BackwardHooks(Member):
    """Hooks on a module's backward pass and on a tensor between layers change gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.last.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
        self.last.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] / 2,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h.register_hook(lambda grad: grad * 1.5)
        return self.last(h)
