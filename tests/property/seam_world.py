"""What an ordinary region may do that a rebuild could get wrong: one function for each hazard.

A hazard is ``make(world, width)``, which returns a function of a tensor ``[rows, width]`` that keeps its shape, and
tells the world what else counts: modules and objects to compare afterwards, actions between forward and backward,
tensors that are left behind and used in the loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

Piece = Callable[[Tensor], Tensor]
GLOBALS: dict[str, Any] = {}


class Cell(nn.Module):
    """A linear layer, and a body that says what is done with it: ``body(cell, h)``."""

    def __init__(self, width: int, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.body = body

    def forward(self, h: Tensor) -> Tensor:
        return self.body(self, h)


@dataclass
class World:
    """Everything around a program's regions: how they are wrapped, and what its hazards left word of."""

    rng: random.Random  # of the choices: the same in both runs
    wrap: Any
    autocast: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    watched: list[Callable[[], Any]] = field(default_factory=list)  # further state to compare
    between: list[Callable[[], Any]] = field(default_factory=list)  # done between forward and backward
    after: list[Callable[[], Any]] = field(default_factory=list)  # done after backward
    left: list[Callable[[], Tensor | None]] = field(default_factory=list)  # tensors left behind by a forward
    leaves: list[Tensor] = field(default_factory=list)
    contexts: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)  # around each forward
    refusable: list[str] = field(default_factory=list)  # hazards to which a FrameError is an answer too
    log: list[str] = field(default_factory=list)

    def cell(self, width: int, body: Callable[[Any, Tensor], Tensor], **state: Any) -> Cell:
        """Make a cell; tensors in ``state`` become buffers, modules submodules, and the rest attributes."""
        cell = Cell(width, body)
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                cell.register_buffer(name, value)
            else:
                setattr(cell, name, value)
        return self.add(cell)

    def add(self, module: Any) -> Any:
        self.modules.append(module)
        return module

    def leaf(self, *shape: int) -> Tensor:
        tensor = torch.randn(shape, requires_grad=True)
        self.leaves.append(tensor)
        return tensor

    def choose(self, *options: Any) -> Any:
        choice = self.rng.choice(options)
        self.log.append(str(choice))
        return choice


@dataclass(frozen=True)
class Hazard:
    make: Callable[..., Any]
    refusable: bool  # a FrameError is an answer too
    weight: float
    autocast: bool  # runs under autocast


HAZARDS: dict[str, Hazard] = {}


def hazard(
    refusable: bool = False, weight: float = 1.0, autocast: bool = False, table: dict[str, Hazard] = HAZARDS
) -> Any:
    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        table[make.__name__] = Hazard(make, refusable, weight, autocast)
        return make

    return register
