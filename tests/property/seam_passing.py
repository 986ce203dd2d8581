"""Hazards: what a region has for a while, makes in its first call, hides from registration, or trains by itself."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from seam_compare import state_of
from seam_world import Piece, World, hazard
from torch import Tensor, nn
from torch.nn import functional as F


def _with_hook(cell: Any) -> Iterator[None]:
    hook = cell.lin.register_forward_hook(lambda module, args, output: output * 1.5)
    yield
    hook.remove()


def _with_pre_hook(cell: Any) -> Iterator[None]:
    hook = cell.lin.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    yield
    hook.remove()


def _with_memory(cell: Any) -> Iterator[None]:
    held = cell.lin.weight.data
    cell.lin.weight.data = held.sign() * 0.3
    yield
    cell.lin.weight.data = held


def _with_buffer(cell: Any) -> Iterator[None]:
    held, cell.scale.data = cell.scale.data, cell.scale.data * 2
    yield
    cell.scale.data = held


def _with_weight(cell: Any) -> Iterator[None]:
    held, cell.lin.weight = cell.lin.weight, cell.second.weight
    yield
    cell.lin.weight = held


def _with_layer(cell: Any) -> Iterator[None]:
    held, cell.lin = cell.lin, cell.second
    yield
    cell.lin = held


def _frozen(cell: Any) -> Iterator[None]:
    cell.lin.requires_grad_(False)
    yield
    cell.lin.requires_grad_(True)


def _evaluating(cell: Any) -> Iterator[None]:
    held = cell.training
    cell.eval()
    yield
    cell.train(held)


WHILES = (
    _with_hook, _with_pre_hook, _with_memory, _with_buffer, _with_weight, _with_layer, _frozen, _evaluating,
)  # fmt: skip


@hazard(weight=2)
def changed_for_a_while(world: World, width: int) -> Piece:
    """Not changed back where an exception passes: the code behind the last saved tensor does it."""
    chosen = [world.choose(*WHILES) for _ in range(world.choose(1, 2))]

    def body(cell, h):
        whiles = [change(cell) for change in chosen]
        for one in whiles:
            next(one)
        h = cell.drop((cell.lin(h) * cell.scale).tanh() + cell.second(h)).sin()
        for one in reversed(whiles):
            next(one, None)
        return h

    second = nn.Linear(width, width)  # no method of modules is called so, as one is by the name of a device
    return world.cell(width, body, second=second, scale=torch.rand(width) + 0.5, drop=nn.Dropout(0.2))


@hazard(weight=2)
def made_in_the_first_call(world: World, width: int) -> Piece:
    kind = world.choose("layer", "parameter", "registered", "lists", "buffer", "table", "mapping")

    def body(cell, h):
        if kind != "":
            if kind in ("layer", "parameter") and cell.made is None:
                cell.made = nn.Linear(width, width) if kind == "layer" else nn.Parameter(torch.randn(width, width))
            if kind == "registered" and not hasattr(cell, "late"):
                cell.register_parameter("late", nn.Parameter(torch.randn(width, width)))
            if kind == "lists" and len(cell.layers) < 2:
                cell.layers.append(nn.Linear(width, width))
                cell.gains.append(nn.Parameter(torch.randn(width)))
            if kind == "buffer":
                if cell.made is None:
                    cell.register_buffer("late", h.detach().mean(0).clone())
                    cell.made = True
                else:
                    cell.late.lerp_(h.detach().mean(0), 0.5)
            if kind in ("table", "mapping"):
                holder = cell.held if kind == "mapping" else vars(cell)
                if holder.get("made") is None:
                    holder["made"] = torch.ones(1500)
                else:
                    holder["made"].mul_(0.9).add_(h.detach().mean() ** 2)
                h = h * holder["made"].mean()
        if isinstance(cell.made, nn.Linear):
            h = cell.made(h)
        if isinstance(cell.made, nn.Parameter):
            h = h @ cell.made
        if hasattr(cell, "late"):
            h = h @ cell.late if cell.late.dim() == 2 else h * cell.late.clone()
        for layer, gain in zip(cell.layers, cell.gains, strict=True):
            h = layer(h).tanh() * gain
        return F.dropout(cell.lin(h).tanh(), 0.2, cell.training)

    cell = world.cell(width, body, held={}, layers=nn.ModuleList(), gains=nn.ParameterList())
    cell.made = None
    world.watched.append(lambda: {name: state_of(module) for name, module in cell.named_modules()})
    return cell


@hazard(weight=1.5)
def trained_inside(world: World, width: int) -> Piece:
    """Gradients of its own, and steps."""
    kind = world.choose("gradients", "grad")
    net = world.add(nn.Linear(width, width))

    def body(cell, h):
        with torch.enable_grad():
            if cell.optimizer is not None:
                cell.optimizer.zero_grad()
            loss = cell.net(h.detach().clone()).tanh().square().mean()
            if kind == "grad":
                (slope,) = torch.autograd.grad(loss, cell.net.weight)
                h = h + slope.mean()
            else:
                loss.backward()
        if cell.optimizer is not None:
            cell.optimizer.step()
        return (cell.lin(h) + cell.net(h).detach()).tanh()

    cell = world.cell(width, body, net=net)
    if kind == "adam":
        cell.optimizer = torch.optim.Adam(net.parameters(), 0.1)
    else:
        cell.optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) if kind == "momentum" else None
    return cell


class _Slots:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


@hazard(refusable=True, weight=1.5)
def hidden_network(world: World, width: int) -> Piece:
    """An average of the layer, in an attribute that registers nothing."""
    how = world.choose("list", "dict", "object", "slots", "attribute", "reference", "closure")
    way, every = world.choose("in place", "data"), world.choose(1, 2)
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)).requires_grad_(False))
    hidden: Any = {
        "list": [net], "dict": {"net": net}, "object": types.SimpleNamespace(net=net), "slots": _Slots(net),
        "attribute": net, "reference": weakref.ref(net), "closure": lambda: net,
    }[how]  # fmt: skip
    find = {
        "list": lambda: hidden[0], "dict": lambda: hidden["net"], "object": lambda: hidden.net,
        "slots": lambda: hidden.net, "attribute": lambda: hidden, "reference": lambda: hidden(),
        "closure": lambda: hidden(),
    }[how]  # fmt: skip

    def body(cell, h):
        cell.calls += 1
        teacher = find()
        weight, mean = teacher[0].weight, teacher[1].running_mean
        h = cell.lin(h).tanh() * (1 + weight.mean() + mean.mean()).clone()
        if cell.calls % every == 0 and not torch.is_inference_mode_enabled():
            with torch.no_grad():
                if way == "data":
                    weight.data = weight.data.lerp(cell.lin.weight, 0.5)
                else:
                    weight.lerp_(cell.lin.weight, 0.5)
                mean.add_(1)
        return h.sin()

    cell = world.cell(width, body, calls=0)
    object.__setattr__(cell, "hidden", hidden)
    return cell


@contextmanager
def _hooked(module: nn.Module, log: list[Tensor]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda module, args, output: output + 0.5)
    try:
        yield
    finally:
        hook.remove()


@hazard()
def hooked_around_the_forward(world: World, width: int) -> Piece:
    """A hook that is there in the forward, and not in backward."""
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    world.contexts.append(lambda: _hooked(cell.lin, []))
    return cell
