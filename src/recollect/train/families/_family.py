"""What the loop asks of a kind of network."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect.data import GraphDataset
from recollect.train._batches import Batches, FullBatch
from recollect.train._embedding import learn_features
from recollect.train._errors import UsageError
from recollect.train._failures import buildable
from recollect.train._graph import TrainingGraph, scaled_features, to_device
from recollect.train._objective import Objective
from recollect.train._settings import Settings

__all__ = ["Family"]


class Family(ABC):
    """A kind of network. The loop, the measurements and the report know networks by this alone.

    Two methods have to be written: `_network`, which `build` calls, and `inputs`. The others are those of a network
    that is trained on the whole graph, and that has nothing to show but its scores.

    Args:
        settings: of the run.

    Attributes:
        any_depth: whether `build` takes ``num_layers``, so that memory can be measured against depth.
        draws_alike: whether several processes draw the same random numbers in their steps, as those of one step do.
    """

    any_depth = False
    draws_alike = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def build(self, graph: TrainingGraph, device: torch.device, num_layers: int | None = None) -> nn.Module:
        """Make the network, with parameters drawn from torch's generator.

        Args:
            graph: prepared; gives channels and task.
            device: that it will be moved to.
            num_layers: instead of the settings' number.

        Raises:
            UsageError: the settings do not go together.
            TrainingError: a package, or a file of histories, is missing or cannot be used.
        """
        with buildable():
            network = self._network(graph, device, num_layers)
        if graph.learnt_features:
            learn_features(network, graph.data.x)
        return network

    @abstractmethod
    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        """Make the network; see `build`, which explains errors."""

    @abstractmethod
    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Any, ...]:
        """What `call` takes for the whole graph."""

    def modes(self, network: nn.Module) -> list[str]:
        """What the steps are called, and what those that they are compared with, if there is a comparison."""
        return ["whole graph"]

    def switch(self, network: nn.Module, second: bool) -> None:  # noqa: B027 - most have nothing to switch
        """Bring the network into the second of its modes, or into the first."""

    def prepare(self, graph: GraphDataset) -> TrainingGraph:
        """Bring a graph into the form that the network and its training take.

        Raises:
            UsageError: it cannot be as the settings say.
            TrainingError: a package is missing.
        """
        if graph.learnt_features and (self.settings.data.features or self.settings.training.name != "full"):
            raise UsageError(
                "dataset.features=embedding needs data.features=null and training=full: learnt vectors are no numbers "
                "of the file; or choose dataset.features=degree"
            )
        data = copy.copy(graph.data)
        data.x = scaled_features(data.x, self.settings.data.features)
        try:
            data, ptr = self._edges(data)
        except (TypeError, ValueError) as error:  # of a graph that was given
            raise UsageError(str(error)) from error
        known = {item.name: getattr(graph, item.name) for item in fields(GraphDataset)}
        return TrainingGraph(**known | {"data": data}, num_edges=graph.data.num_edges, ptr=ptr)

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """Edges as the network takes them, and the bounds of the parts if the graph is cut."""
        return data, None

    def expect(self, graph: TrainingGraph, device: torch.device) -> str | None:
        """Say what the network will take beside its parameters, before it is made.

        Raises:
            TrainingError: there is no room for it.
        """
        return None

    def place(self, graph: TrainingGraph, device: torch.device) -> TrainingGraph:
        """The graph where evaluation wants it."""
        return to_device(graph, device)

    def batches(self, network: nn.Module, graph: TrainingGraph, device: torch.device, second: bool = False) -> Batches:
        """The steps of an epoch, in the first or in the second of the modes."""
        inputs = tuple(item.to(device) for item in self.inputs(network, graph))
        return FullBatch(to_device(graph, device), inputs, self.settings.training.edge_dropout)

    def call(self, model: Callable[..., Any], inputs: tuple[Any, ...]) -> Tensor:
        """Return the logits of a batch."""
        return cast(Tensor, model(*inputs))

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """A function from the model to the logits [num_nodes, num_classes], where the graph's labels are."""
        inputs = self.inputs(network, graph)
        return lambda model: self.call(model, inputs)

    def of_parts(self, network: nn.Module, data: Any) -> tuple[Any, tuple[str, ...]]:
        """The graph as `recollect.outofcore.WholeGraph` takes it, and the names of what layers get of each edge."""
        return data, ()

    def tables(self, num_classes: int) -> tuple[int, int] | None:
        """Numbers, and bytes of masks, that the tables of steps part by part have for each node; None if unknown."""
        return None

    def checked(self, logits: Tensor, graph: TrainingGraph) -> Tensor:
        """The logits of an evaluation.

        Raises:
            UsageError: they are not of this graph.
        """
        return logits

    def rehearse(self, evaluate: Callable[[], Tensor]) -> None:  # noqa: B027 - ours are known to work
        """Find out whether the network can be trained, before anything is written.

        Raises:
            UsageError: it cannot.
        """

    def fill(self, evaluate: Callable[[], Tensor]) -> None:  # noqa: B027 - most have nothing to fill
        """Bring what steps read, beside the parameters, to the state of the parameters."""

    def kept(self, network: nn.Module) -> dict[str, Any]:
        """Return what steps read beside the parameters and cannot be computed of them: for the checkpoint."""
        return {}

    def restore(self, network: nn.Module, kept: dict[str, Any]) -> None:  # noqa: B027 - most have kept nothing
        """Take over what :meth:`kept` returned.

        Raises:
            ValueError: it is of another network or graph.
        """

    def own_step(self, network: nn.Module, graph: TrainingGraph, objective: Objective) -> Callable[[], Tensor] | None:
        """What computes loss and gradients of an epoch's one step, where the loop does not; returns the mean loss."""
        return None

    def begin(self, network: nn.Module, graph: TrainingGraph, epoch: int) -> None:  # noqa: B027 - most do nothing
        """Do what is due before an epoch, which is numbered from 1."""

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """Return what the last training steps left to be seen, for a row of metrics.csv.

        Args:
            network: that took them.
            graph: it was placed.
            errors: whether what costs a pass over the graph is wanted too.
        """
        return {}

    def summarize(
        self, network: nn.Module, history: Sequence[dict[str, float]], device: torch.device
    ) -> dict[str, Any]:
        """What summary.json holds of ``histories`` or ``tables``, if there are any."""
        return {}

    def plain_bytes(self, network: nn.Module, graph: TrainingGraph, batches: Batches, peak: int) -> tuple[int, int]:
        """Bytes of a step in the second mode, which was not measured yet: at most, and about.

        Args:
            network: that is measured.
            graph: it was placed.
            batches: of the first mode.
            peak: bytes of a step in the first mode.
        """
        return peak, peak

    def size(self, num_nodes: int) -> tuple[int, int]:
        """Numbers that a layer makes, and numbers that stay if all activations are kept; zeros if unknown."""
        return 0, 0
