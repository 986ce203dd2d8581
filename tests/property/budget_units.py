"""Units of random networks for plans: one function for each kind, ``make(draw, width)``.

A unit takes and returns ``[batch, length, width]``; those of ``PAIRS`` take and return two of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect
import recollect.invertible as inn
from recollect.reversible import GroupAddRev, InvertibleModule
from recollect.testing._zoo import ZOO

Make = Callable[[random.Random, int], nn.Module]
UNITS: dict[str, Make] = {}


def unit(make: Make) -> Make:
    UNITS[make.__name__] = make
    return make


class Body(nn.Module):
    """A function of the module and its input, over named parts."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Any, graph: None = None) -> Any:
        return self.body(self, x)


def mlp(draw: random.Random, width: int) -> nn.Sequential:
    wide = width * draw.choice((1, 2, 4))
    return nn.Sequential(nn.Linear(width, wide), draw.choice((nn.Tanh, nn.GELU, nn.ReLU))(), nn.Linear(wide, width))


@unit
def sequential(draw: random.Random, width: int) -> nn.Module:
    return mlp(draw, width)


@unit
def residual(draw: random.Random, width: int) -> nn.Module:
    norm = nn.LayerNorm(width)
    return Body(lambda m, x: x + m.mlp(m.norm(x)), mlp=mlp(draw, width), norm=norm)


@unit
def dropout(draw: random.Random, width: int) -> nn.Module:
    parts = [nn.Linear(width, width), nn.Dropout(0.3), nn.Linear(width, width), nn.Dropout(0.2)]
    return nn.Sequential(*parts)


@unit
def noise(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: m.lin(x * (1 + 0.1 * torch.rand_like(x))).tanh(), lin=nn.Linear(width, width))


@unit
def batch_norm(draw: random.Random, width: int) -> nn.Module:
    body = lambda m, x: m.norm(m.lin(x).transpose(1, 2)).transpose(1, 2).tanh()  # noqa: E731
    return Body(body, lin=nn.Linear(width, width), norm=nn.BatchNorm1d(width))


@unit
def convolution(draw: random.Random, width: int) -> nn.Module:
    conv, norm = nn.Conv1d(width, width, 3, padding=1), nn.GroupNorm(2, width)
    return Body(lambda m, x: x + m.norm(m.conv(x.transpose(1, 2))).relu().transpose(1, 2), conv=conv, norm=norm)


@unit
def recurrent(draw: random.Random, width: int) -> nn.Module:
    cell = draw.choice((nn.LSTM, nn.GRU, nn.RNN))(width, width, batch_first=True)
    return Body(lambda m, x: m.cell(x)[0], cell=cell)


@unit
def attention(draw: random.Random, width: int) -> nn.Module:
    part = nn.MultiheadAttention(width, 2, dropout=draw.choice((0.0, 0.2)), batch_first=True)

    def body(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        return x + m.attention(h, h, h, attn_mask=mask, need_weights=False)[0]

    return Body(body, norm=nn.LayerNorm(width), attention=part)


@unit
def transformer(draw: random.Random, width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=draw.random() < 0.5
    )


@unit
def in_place(draw: random.Random, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))


@unit
def changes_its_input(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: m.lin(x.mul_(0.5)).tanh(), lin=nn.Linear(width, width))


@unit
def changes_a_copy(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: m.lin(x.clone().mul_(0.5)).tanh_(), lin=nn.Linear(width, width))


@unit
def frozen(draw: random.Random, width: int) -> nn.Module:
    return mlp(draw, width).requires_grad_(False)


@unit
def half_frozen(draw: random.Random, width: int) -> nn.Module:
    made = mlp(draw, width)
    made[0].requires_grad_(False)
    return made


@unit
def without_parameters(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: x.sin() * x.exp().add(1).log())


@unit
def passes_on(draw: random.Random, width: int) -> nn.Module:
    return draw.choice((nn.Identity, lambda: nn.Dropout(0.0), lambda: Body(lambda m, x: x.view(x.shape))))()


@unit
def counts(draw: random.Random, width: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.number += 1
        return m.lin(x) * (1 + 0.1 * m.calls) + 0.01 * m.number

    return Body(body, lin=nn.Linear(width, width), calls=torch.zeros(()), number=0)


@unit
def running_mean(draw: random.Random, width: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        m.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return m.lin(x - m.mean)

    return Body(body, lin=nn.Linear(width, width), mean=torch.zeros(width))


@unit
def checkpoint_inside(draw: random.Random, width: int) -> nn.Module:
    if draw.random() < 0.5:
        return Body(lambda m, x: x + recollect.checkpoint(m.mlp, x), mlp=mlp(draw, width))
    return Body(lambda m, x: x + torch_checkpoint(m.mlp, x, use_reentrant=False), mlp=mlp(draw, width))


def halved(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(g if g is None else g * 0.5 for g in inputs)


@unit
def hooks(draw: random.Random, width: int) -> nn.Module:
    made = mlp(draw, width)
    made.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    made.register_forward_hook(lambda m, args, out: out.tanh())
    made[0].register_full_backward_hook(halved)
    return made


@unit
def parametrized(draw: random.Random, width: int) -> nn.Module:
    lin = draw.choice((parametrizations.weight_norm, parametrizations.spectral_norm))(nn.Linear(width, width))
    return nn.Sequential(lin, nn.Tanh())


@unit
def no_grad_inside(draw: random.Random, width: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.gate(x).sigmoid()
        return x + m.lin(x) * gate

    return Body(body, lin=nn.Linear(width, width), gate=nn.Linear(width, width))


@unit
def detaches(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: m.lin(x.detach()).tanh(), lin=nn.Linear(width, width))


@unit
def autocast_inside(draw: random.Random, width: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.lin(x.to(m.lin.weight.dtype)).tanh()

    return Body(body, lin=nn.Linear(width, width))


@unit
def twice_inside(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: m.mlp(m.mlp(x).sin()), mlp=mlp(draw, width))


@unit
def own_function(draw: random.Random, width: int) -> nn.Module:
    return Body(lambda m, x: Cube.apply(m.lin(x).tanh()), lin=nn.Linear(width, width))


@unit
def random_of_python(draw: random.Random, width: int) -> nn.Module:
    """Which no rebuild repeats."""
    return Body(lambda m, x: m.lin(x) * (1 + random.random()), lin=nn.Linear(width, width))


@unit
def group_add_rev(draw: random.Random, width: int) -> nn.Module:
    half = width // 2
    block = nn.Sequential(nn.LayerNorm(half), nn.Linear(half, half), nn.Tanh(), nn.Dropout(0.2))
    return OnNoGraph(Body(lambda m, x: m.net(x), net=block), num_groups=2)


@unit
def invertible_module(draw: random.Random, width: int) -> nn.Module:
    return Swap(width // 2)


@unit
def affine(draw: random.Random, width: int) -> nn.Module:
    half = width // 2
    return inn.AffineCoupling(*[nn.Sequential(nn.Linear(half, width), nn.Tanh()) for _ in range(2)], dim=-1)


@unit
def invertible_stack(draw: random.Random, width: int) -> nn.Module:
    half = width // 2
    blocks = [nn.Sequential(nn.Linear(half, half), nn.Tanh()) for _ in range(4)]
    first, last = (inn.AdditiveCoupling(*blocks[i : i + 2], dim=-1) for i in (0, 2))
    return inn.Sequential(first, inn.LeakyReLU(0.5), last)


class OnNoGraph(GroupAddRev):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, None)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Swap(InvertibleModule):
    def __init__(self, half: int) -> None:
        super().__init__()
        self.lin = nn.Linear(half, half)

    def _forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.lin(a).tanh(), a], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        c, a = y.chunk(2, -1)
        return torch.cat([a, c - self.lin(a).tanh()], -1)


class OfZoo(nn.Module):
    """A module of the zoo of hazards, between pairs of ``[rows, width]``."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.part, self.inputs = ZOO[name](width)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        more = self.inputs(len(a))[2:]
        out = self.part(a, b, *more)
        return out[0], out[1]


def of_zoo(name: str) -> Make:
    return lambda draw, width: OfZoo(name, width)
