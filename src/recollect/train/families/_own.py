"""A network of one's own: any module, given to `fit` or imported by its name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect.autoscale import ScalableGNN, edge_index_of, to_adj_t
from recollect.models import RevGNN
from recollect.reversible import InvertibleModule
from recollect.train._batches import Batches
from recollect.train._errors import UsageError
from recollect.train._graph import ADJACENCY, TrainingGraph, with_edge_index
from recollect.train._settings import ImportSettings, Settings
from recollect.train.families._family import Family
from recollect.train.families._histories import HistoriesFamily, check_inputs
from recollect.train.families._imported import imported
from recollect.train.families._whole_graph import WholeGraphFamily

__all__ = ["Call", "OwnFamily", "own_family"]

Call = Callable[[Callable[..., Any], Any], Tensor]
"""From a model and the graph's ``Data`` to logits [num_nodes, num_classes]."""

_FIELDS = ("x", "edge_index", "adj_t", "edge_attr", "edge_weight")


def own_family(settings: Settings, model: nn.Module | None = None, call: Call | None = None) -> Family:
    """The family of a network of one's own.

    Args:
        settings: of the run.
        model: the network; None: the one that ``model.target`` makes.
        call: how it is called, see `OwnFamily`.

    Raises:
        UsageError: it is called part by part, which ``call`` cannot say.
    """
    kind = settings.training.name
    if call is not None and kind != "full":
        raise UsageError(
            f"call= says how a model is called with the whole graph, and training={kind} calls it part by part, as a "
            "recollect.autoscale.ScalableGNN: leave call out, or choose training=full"
        )

    def make(graph: TrainingGraph) -> nn.Module:
        return imported(cast(ImportSettings, settings.model), graph) if model is None else model

    if kind == "autoscale":
        return HistoriesFamily(settings, make)
    family = OwnFamily(settings, make, call)
    return WholeGraphFamily(settings, family) if kind == "wholegraph" else family


class OwnFamily(Family):
    """Any module that is called with the whole graph.

    What it is called with is what its ``forward`` names of ``x``, ``edge_index``, ``adj_t``, ``edge_attr`` and
    ``edge_weight``; under other names the first argument is ``x`` and the second ``edge_index``. Where it takes
    ``adj_t``, all that edges have is in the order of ``adj_t``. A `recollect.autoscale.ScalableGNN` is called with
    ``x``, ``adj_t`` and what its ``inputs`` name.

    Reversible modules in it, those of `recollect.reversible`, are measured beside the same with everything kept.

    Args:
        settings: of the run.
        make: makes the network, of a graph that was prepared.
        call: from the network and the graph's ``Data`` to the logits, where its signature does not say it.
    """

    def __init__(
        self, settings: Settings, make: Callable[[TrainingGraph], nn.Module], call: Call | None = None
    ) -> None:
        super().__init__(settings)
        self._make = make
        self._call = call
        self._names: list[str | None] = []
        self._given = ""  # the graph, in words
        self._stages: list[InvertibleModule] = []

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        network = self._make(graph)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UsageError(
                f"no parameter of the {type(network).__name__} is to be trained: let some have requires_grad=True"
            )
        self._stages = [m for m in network.modules() if isinstance(m, InvertibleModule) and not m.disable]
        return network

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Any, ...]:
        """The graph, or what the network's signature names of it."""
        self._given = ", ".join(map(_described, graph.data.to_dict().items()))
        if self._call is not None:
            return (graph.data,)
        chosen = _arguments(network, graph.data)
        self._names = [name for name, _ in chosen]
        return tuple(self._fields(network, graph.data, [field for _, field in chosen]))

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """As they are; of a graph that was cut into parts, with the adjacency of the settings."""
        return (self._with_adjacency(copy.copy(data)) if "adj_t" in data else data), None

    def call(self, model: Callable[..., Any], inputs: tuple[Any, ...]) -> Tensor:
        """Return the logits."""
        if self._call is not None:
            found = self._call(model, inputs[0])
        else:
            named = list(zip(self._names, inputs, strict=True))
            found = model(
                *(value for name, value in named if name is None),
                **{name: value for name, value in named if name is not None},
            )
        if not isinstance(found, Tensor) or found.dim() != 2:
            what = f"{list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UsageError(
                f"the model returned {what}, and a tensor of logits [num_nodes, num_classes] is wanted: return that, "
                f"or say by call= how to get it"
            )
        return found

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """A function from the model to the logits; they are refused if they are not of this graph's classes."""
        evaluate = super().evaluation(network, graph)
        return lambda model: self.checked(evaluate(model), graph)

    def checked(self, logits: Tensor, graph: TrainingGraph) -> Tensor:
        """The logits of an evaluation; they are refused if they are not of this graph's classes."""
        shape = graph.data.num_nodes, graph.num_classes
        if logits.shape != shape:
            raise UsageError(
                f"the model returned logits {list(logits.shape)}, and the graph has {shape[0]} nodes and "
                f"{shape[1]} {'classes' if graph.task == 'multiclass' else 'labels'}: {list(shape)} is wanted"
            )
        return logits

    def rehearse(self, evaluate: Callable[[], Tensor]) -> None:
        """Evaluate once; what the model raises then is about what it was given."""
        try:
            evaluate()
        except (UsageError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise UsageError(
                f"the model cannot be called with this graph ({self._given}): {type(error).__name__}: {error}"
            ) from error

    def modes(self, network: nn.Module) -> list[str]:
        """Reversible and with everything kept, if there are reversible modules."""
        return ["reversible", "everything kept"] if self._stages else super().modes(network)

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation of the reversible modules, or recollect them."""
        for module in self._stages:
            module.disable = second

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift``, the largest relative reconstruction error of the reversible modules."""
        if not self._stages:
            return {}
        drift = InvertibleModule.largest_drift(self._stages)
        return {"drift": float("nan") if drift is None else drift}

    def plain_bytes(self, network: nn.Module, graph: TrainingGraph, batches: Batches, peak: int) -> tuple[int, int]:
        """A reversible module's rebuild takes at most the peak, and what is kept is that of all their calls."""
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hooks = [module.register_forward_pre_hook(count) for module in self._stages]
        try:
            with torch.no_grad():
                self.evaluation(network, graph)(network)
        finally:
            for hook in hooks:
                hook.remove()
        return peak * max(calls, 1), peak * max(calls, 1)

    def _fields(self, network: nn.Module, data: Any, names: list[str]) -> Iterator[Tensor]:
        """What the graph has by these names; what edges have in the order of ``adj_t``, if that is among them."""
        edges = data
        if "adj_t" in names and "adj_t" not in data:
            edges = copy.copy(data)
            for name in set(edges.keys()) - {*names, "edge_index", "edge_weight"}:
                del edges[name]  # of which nobody may know whether it belongs to nodes or to edges
            edges.num_nodes = data.num_nodes
            try:
                edges = self._with_adjacency(to_adj_t(edges))
            except ValueError as error:
                raise UsageError(str(error)) from error
        check_inputs(network, [name for name in names if name not in _FIELDS or name == "edge_attr"], edges)
        for name in names:
            if name == "edge_index" and name not in edges:
                yield edge_index_of(edges.adj_t)
            elif name == "edge_weight" and name not in edges:
                yield edges.adj_t.values()
            else:
                yield cast(Tensor, edges[name])

    def of_parts(self, network: nn.Module, data: Any) -> tuple[Any, tuple[str, ...]]:
        """What the convolutions of a RevGNN name; it gets no weights that these do not know of."""
        if not isinstance(network, RevGNN):
            return data, ()
        names = network.conv_inputs
        return (data if "edge_weight" in names else with_edge_index(data)), names

    def _with_adjacency(self, data: Any) -> Any:
        """A graph with ``adj_t``, which becomes that of the settings; edges that are added have no attributes."""
        adjacency = cast(ImportSettings, self.settings.model).adjacency
        data.adj_t = ADJACENCY[adjacency](data.adj_t)
        if adjacency != "plain" and "edge_attr" in data:
            del data.edge_attr
        return data


def _arguments(network: nn.Module, data: Any) -> list[tuple[str | None, str]]:
    """What a call gives: a keyword, or None for an argument by position, and the field of the graph that it gets."""
    if isinstance(network, ScalableGNN) and network.num_nodes:
        return [(None, "x"), (None, "adj_t"), *((name, name) for name in network.inputs)]
    kinds = inspect.Parameter
    parameters = list(inspect.signature(network.forward).parameters.values())
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    if not named:
        return [(None, "x"), (None, "edge_index")]
    there = {*(field for field in _FIELDS if field in data), "edge_index", "adj_t"}
    chosen: list[tuple[str | None, str]] = []
    for place, parameter in enumerate(named):
        field, wanted = parameter.name, parameter.default is kinds.empty
        if field not in _FIELDS and wanted and place < 2:
            field = ("x", "edge_index")[place]
        if field in _FIELDS and field in there:
            chosen.append((None if wanted and parameter.kind is not kinds.KEYWORD_ONLY else parameter.name, field))
        elif wanted:
            has = ", ".join(name for name in _FIELDS if name in there)
            raise UsageError(
                f"{type(network).__name__}.forward wants {parameter.name!r}, and a graph gives {has}: name one of "
                f"these, or say by call=lambda model, data: ... how the model is called"
            )
    return chosen


def _described(item: tuple[str, Any]) -> str:
    name, value = item
    if not isinstance(value, Tensor):
        return name
    return f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
