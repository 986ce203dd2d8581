"""Hazards: what changes between a region's forward and its backward."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from seam_world import Piece, World, hazard
from torch import nn


def _toggle(holder: Any, name: str, a: Any, b: Any) -> Callable[[], None]:
    """Return an action that sets the attribute to ``b``, and back to ``a`` the next time."""

    def act() -> None:
        setattr(holder, name, b if getattr(holder, name) == a else a)

    return act


@hazard(autocast=True)
def adapter_switched(world: World, width: int) -> Piece:
    def body(cell, h):
        return (cell.lin(h) + cell.adapters[cell.active](h)).tanh()

    adapters = nn.ModuleDict({k: nn.Linear(width, width) for k in "ab"})
    cell = world.cell(width, body, adapters=adapters, active="a")
    world.between.append(_toggle(cell, "active", "a", "b"))
    return cell


@hazard(autocast=True)
def dropout_rescheduled(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Linear(width, width)))
    world.between.append(_toggle(net[1], "p", 0.2, 0.6))
    return net


@hazard(autocast=True)
def temperature_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) / cell.temperature).tanh(), temperature=1.0)
    world.between.append(_toggle(cell, "temperature", 1.0, 0.5))
    return cell


@hazard(autocast=True)
def training_flag_changed(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Tanh()))
    world.between.append(net.eval)
    world.after.append(net.train)
    return net


@hazard()
def settings_changed(world: World, width: int) -> Piece:
    """A dict in an attribute, changed in place."""
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh() * cell.cfg["scale"][0], cfg={"scale": [2.0]})
    world.between.append(lambda: cell.cfg["scale"].__setitem__(0, cell.cfg["scale"][0] * 1.5))
    return cell


@hazard(refusable=True)
def settings_of_a_closure_changed(world: World, width: int) -> Piece:
    cfg = {"scale": 2.0}
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh() * cfg["scale"])
    world.between.append(lambda: cfg.update(scale=cfg["scale"] * 1.5))
    return cell


@hazard()
def function_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.act(cell.lin(h)), act=torch.sin)
    world.between.append(_toggle(cell, "act", torch.sin, torch.tanh))
    return cell


@hazard(refusable=True)
def submodule_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.act(cell.lin(h)), act=nn.Tanh())
    world.between.append(lambda: setattr(cell, "act", nn.SiLU()))
    return cell


@hazard()
def statistics_exchanged(world: World, width: int) -> Piece:
    """Buffers that a forward in training mode writes and does not read, and how fast they follow."""
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)))

    def act() -> None:
        net[1].running_mean = torch.zeros(width, dtype=net[1].weight.dtype)
        net[1].momentum = 0.7

    world.between.append(act)
    return net


@hazard()
def buffer_exchanged(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * cell.scale, scale=torch.rand(width) + 0.5)
    world.between.append(lambda: setattr(cell, "scale", torch.rand(width, generator=torch.Generator()) + 0.5))
    return cell


@hazard()
def what_is_not_read_changes(world: World, width: int) -> Piece:
    """A spare layer's parameters and buffers."""
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh(), spare=nn.BatchNorm1d(width), note=torch.zeros(3))
    way = world.choose("in place", "data", "replaced", "step")

    def act() -> None:
        with torch.no_grad():
            if way == "in place":
                cell.spare.weight.add_(1)
                cell.spare.running_mean.add_(1)
                cell.note.add_(1)
            elif way == "data":
                cell.spare.weight.data.add_(1)
                cell.note.data.add_(1)
            elif way == "replaced":
                cell.spare.weight = nn.Parameter(torch.ones(width))
                cell.note = torch.ones(3)
            else:
                cell.spare.bias.grad = torch.ones(width)
                torch.optim.SGD(cell.spare.parameters(), 0.1).step()

    world.between.append(act)
    return cell


@hazard()
def critic_is_stepped(world: World, width: int) -> Piece:
    """An object holds two networks; the region runs one of them, and the optimizer steps the other."""
    pair = types.SimpleNamespace(generator=nn.Linear(width, width), critic=nn.Linear(width, 1))
    world.modules += [pair.generator, pair.critic]
    optimizer = torch.optim.SGD(pair.critic.parameters(), 0.1)

    def act() -> None:
        pair.critic.weight.grad = torch.ones_like(pair.critic.weight)
        optimizer.step()

    world.between.append(act)
    return lambda h: pair.generator(h).tanh()


@hazard(refusable=True)
def parameters_are_stepped(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) + cell.bias).tanh(), bias=nn.Parameter(torch.rand(width)))
    which = world.choose("weight", "bias")

    def act() -> None:
        parameter = cell.lin.weight if which == "weight" else cell.bias
        with torch.no_grad():
            parameter.sub_(0.1)

    world.between.append(act)
    return cell


@hazard(refusable=True)
def what_is_read_changes_through_data(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) + cell.shift).tanh(), shift=torch.rand(width))
    which = world.choose("shift", "bias")
    world.between.append(lambda: (cell.shift if which == "shift" else cell.lin.bias).data.add_(0.5))
    return cell


@hazard(refusable=True)
def parameter_exchanged(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    world.leaves.append(cell.lin.weight)
    world.between.append(lambda: setattr(cell.lin, "weight", nn.Parameter(torch.ones(width, width) / 3)))
    return cell


@hazard(refusable=True)
def requires_grad_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.more(cell.lin(h).tanh()), more=nn.Linear(width, width))
    world.between.append(lambda: cell.more.requires_grad_(False))
    world.after.append(lambda: cell.more.requires_grad_(True))
    return cell


@hazard()
def default_dtype_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * torch.full((width,), 0.3) + torch.tensor(0.7))
    world.between.append(lambda: torch.set_default_dtype(torch.float32))
    world.after.append(lambda: torch.set_default_dtype(torch.float64))
    return cell
