"""What a step needs of a network: one protocol, behind which each kind of network stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recollect.outofcore._step import Run, Space, Step
from recollect.outofcore._tables import Shape
from recollect.outofcore._writes import Writes

__all__ = ["Graph", "Network"]


@dataclass(frozen=True)
class Graph:
    """A graph as it was given.

    Attributes:
        data: with ``adj_t``, ``x``, ``y`` and ``train_mask``.
        edges: what convolutions get of each edge, by name [E, ...], on the CPU.
        in_order: whether the edges into each node are in the same order in its edge index as in its adjacency.
    """

    data: Any
    edges: dict[str, Tensor]
    in_order: bool


class Network(ABC):
    """A network whose steps go part by part.

    Attributes:
        model: the network.
        further: whether parts need the edges into their neighbours too.
        mark: bytes of what is noted of a computation of the forward pass.
    """

    model: nn.Module
    further: bool
    mark: int = 8

    @abstractmethod
    def tables(self) -> dict[str, Shape]:
        """Return the tables of a step of one loss, by name."""

    @property
    @abstractmethod
    def moved(self) -> list[str]:
        """The names of the tables that passes over the parts change, and not only write."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """The bytes of a node's gradients of one loss that an operation holds."""

    @abstractmethod
    def places(self, parts: int) -> int:
        """Return how many computations of a forward pass are compared in backward."""

    @abstractmethod
    def settle(self, space: Space, graph: Graph) -> None:
        """Take notice of where numbers lie, before the first step."""

    @abstractmethod
    def check(self) -> None:
        """Check that the network, in its modes, can still be computed part by part.

        Raises:
            TypeError: it is of another kind.
            ValueError: it was changed into one for which this was not made.
        """

    @abstractmethod
    def draw(self) -> None:
        """Draw what a step draws for the whole graph."""

    @abstractmethod
    def watch(self, writes: Writes) -> None:
        """Run what writes buffers once, in the network's order."""

    @abstractmethod
    def uses(self) -> Counter[nn.Parameter]:
        """Return how many passes bring gradients of each parameter."""

    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """Return what tells this network from others beside its parameters, modes and modules."""

    @abstractmethod
    def step(self, space: Space, run: Run) -> Step:
        """Return a step, or an evaluation, that has not begun."""

    def check_norms(self) -> None:
        """Check that nothing normalises over all nodes.

        Raises:
            ValueError: batch normalisation in training mode.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which in training normalises over all nodes at once: parts "
                    'have other means. Use norm="layer" (LayerNorm), or model.eval() to keep its statistics'
                )
