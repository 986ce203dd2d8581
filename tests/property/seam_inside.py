"""Hazards: random numbers, modules used in other ways than by a call, hooks, and autograd inside of a region."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from seam_world import Piece, World, hazard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

# Random numbers.


@hazard(weight=2, autocast=True)
def random_of_torch(world: World, width: int) -> Piece:
    kind = world.choose(
        "dropout", "functional", "rand", "randperm", "multinomial", "normal_", "fork", "seeded", "noise"
    )

    def body(cell, h):
        h = cell.lin(h)
        if kind == "dropout":
            return cell.drop(h)
        if kind == "functional":
            return F.dropout(h, 0.3)
        if kind == "rand":
            return h * torch.rand(width)
        if kind == "randperm":
            return h[torch.randperm(len(h))]
        if kind == "multinomial":
            return h * (1 + torch.multinomial(torch.full((width,), 0.5), width, replacement=True))
        if kind == "normal_":
            return h + torch.empty(width).normal_()
        if kind == "noise":
            with torch.no_grad():
                noise = torch.bernoulli(torch.full_like(h, 0.5))
            return h * noise + noise
        if kind == "fork":
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                return h * torch.rand(width)
        torch.manual_seed(17)
        return h * torch.rand(width)

    return world.cell(width, body, drop=nn.Dropout(0.3))


@hazard(refusable=True)
def generator_of_the_module(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * torch.rand(width, generator=cell.generator))
    cell.generator = torch.Generator().manual_seed(5)
    return cell


@hazard(refusable=True, weight=1.5)
def random_of_others(world: World, width: int) -> Piece:
    kind = world.choose("numpy", "python", "rows", "numpy's generator")

    def body(cell, h):
        h = cell.lin(h)
        if kind == "numpy":
            return (h * float(np.random.rand())).sin()  # noqa: NPY002  (saved; else drawn anew without a word)
        if kind == "python":
            return (h * random.random()).sin()
        if kind == "rows":
            return h[random.sample(range(len(h)), len(h))]
        return h * float(cell.generator.random())

    return world.cell(width, body, generator=np.random.default_rng(5))


# Modules used in other ways than by a call.


@hazard(autocast=True)
def weight_of_another(world: World, width: int) -> Piece:
    other = world.add(nn.Linear(width, width))
    return world.cell(width, lambda cell, h: F.linear(cell.lin(h).tanh(), other.weight))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.mT) / 2


@hazard(weight=2)
def parametrized(world: World, width: int) -> Piece:
    kind = world.choose(
        "own", "cached", "weight norm", "spectral norm", "old weight norm", "old spectral norm", "pruned"
    )
    cell = world.cell(width, lambda cell, h: cell.lin(cell.lin(h).tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("own", "cached"):
            parametrize.register_parametrization(cell.lin, "weight", Symmetric())
        if kind == "cached":
            world.contexts.append(parametrize.cached)
        if kind == "weight norm":
            parametrizations.weight_norm(cell.lin)
        if kind == "spectral norm":
            parametrizations.spectral_norm(cell.lin)
        if kind == "old weight norm":
            nn.utils.weight_norm(cell.lin)
        if kind == "old spectral norm":
            nn.utils.spectral_norm(cell.lin)
        if kind == "pruned":
            prune.l1_unstructured(cell.lin, "weight", 0.4)
    return cell


@hazard(autocast=True)
def tied(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))
    net[2].weight = net[0].weight
    return net


@hazard()
def called_functionally(world: World, width: int) -> Piece:
    def body(cell, h):
        new = {"weight": cell.lin.weight * cell.gain, "bias": cell.lin.bias}
        return torch.func.functional_call(cell.lin, new, h).tanh()

    return world.cell(width, body, gain=nn.Parameter(torch.rand(width)))


@hazard(weight=0.1)
def scripted(world: World, width: int) -> Piece:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return world.add(nn.Sequential(torch.jit.script(nn.Linear(width, width)), nn.Tanh()))


@hazard(weight=0.1)
def many_layers(world: World, width: int) -> Piece:
    layers = [*(nn.Identity() for _ in range(260)), world.add(nn.BatchNorm1d(width))]

    def run(h: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h)
        return h

    return run


# What is left behind, hooks, and autograd inside.


@hazard(autocast=True)
def left_on_the_module(world: World, width: int) -> Piece:
    kind = world.choose("loss", "features", "in a list")

    def body(cell, h):
        h = cell.lin(h).tanh()
        value = h.square().mean() if kind == "loss" else h * 2
        cell.aux = [value] if kind == "in a list" else value
        return h

    cell = world.cell(width, body, aux=None)
    world.left.append(lambda: cell.aux[0] if isinstance(cell.aux, list) else cell.aux)
    return cell


@hazard(autocast=True)
def forward_hook(world: World, width: int) -> Piece:
    kind = world.choose("stores", "changes", "changes the input")
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    if kind == "stores":
        cell.lin.register_forward_hook(lambda module, args, output: setattr(module, "seen", output))
        world.left.append(lambda: getattr(cell.lin, "seen", None))
    elif kind == "changes":
        cell.lin.register_forward_hook(lambda module, args, output: output * 2)
    else:
        cell.lin.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return cell


@hazard()
def backward_hook(world: World, width: int) -> Piece:
    kind = world.choose("module", "tensor", "changes")

    def body(cell, h):
        h = cell.lin(h)
        if kind != "module" and h.requires_grad:
            h.register_hook(lambda g: g * 2 if kind == "changes" else cell.seen.append(1))
        return h.tanh()

    cell = world.cell(width, body, seen=[])
    if kind == "module":
        cell.lin.register_full_backward_hook(lambda module, gi, go: cell.seen.append(1))
    return cell


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.factor = factor
        return factor * h**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return ctx.factor * 3 * h**2 * grads[0], None


@hazard(autocast=True)
def custom_function(world: World, width: int) -> Piece:
    return world.cell(width, lambda cell, h: Cube.apply(cell.lin(h).tanh(), 0.5))


@hazard()
def gradient_inside(world: World, width: int) -> Piece:
    create = world.choose(True, False)

    def body(cell, h):
        z = h.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(cell.lin(z).sin().square().sum(), z, create_graph=create)
        return cell.lin(h).tanh() + 0.1 * g

    return world.cell(width, body)


@hazard(autocast=True)
def saved_in_another_way(world: World, width: int) -> Piece:
    """Other users of autograd's hooks, inside of the region."""
    kind = world.choose("torch's checkpoint", "save_on_cpu", "halved")

    def body(cell, h):
        if kind == "torch's checkpoint":
            return torch.utils.checkpoint.checkpoint(lambda h: cell.lin(h).tanh(), h, use_reentrant=False)
        if kind == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return cell.lin(h).tanh()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t / 2, lambda t: t * 2):
            return cell.lin(h).sin()

    return world.cell(width, body)


@hazard(autocast=True)
def partly_without_grad(world: World, width: int) -> Piece:
    kind = world.choose("no_grad", "detach", "frozen")
    cell = world.cell(width, lambda cell, h: h)
    if kind == "frozen":
        cell.lin.requires_grad_(False)

    def body(cell, h):
        if kind == "no_grad":
            with torch.no_grad():
                gate = cell.lin(h).sigmoid()
            return h * gate
        return cell.lin(h).tanh() * (h.detach() if kind == "detach" else h)

    cell.body = body
    return cell


@hazard(autocast=True)
def in_place_inside(world: World, width: int) -> Piece:
    return world.cell(width, lambda cell, h: cell.lin(h).mul_(0.5).add_(h).tanh_())


@hazard(weight=3, autocast=True)
def plain_layers(world: World, width: int) -> Piece:
    return world.add(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width)))
