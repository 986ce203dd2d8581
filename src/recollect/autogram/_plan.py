"""Who accounts for which parameter: a rule, autograd itself, or the rows of the nodes where it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from recollect.autogram._independence import Independence
from recollect.autogram._probe import Layouts
from recollect.autogram._targets import Target, TargetFinder, mixing_captures
from recollect.autogram._walk import Graph

__all__ = ["Declined", "EntangledError", "Plan", "changed_layers", "plan_batch", "plan_rows"]

Declined = Collection[tuple[int, str]]
"""Captures, and the names of parameters of theirs, for which their rule gave nothing."""


class EntangledError(Exception):
    """The rows of some parameters do not come apart in a pass for the whole batch: they go row by row.

    Attributes:
        parameters: their ids.
    """

    def __init__(self, parameters: Collection[int]) -> None:
        super().__init__(f"{len(parameters)} parameters")
        self.parameters = tuple(parameters)


@dataclass(slots=True)
class Plan:
    """What is done in a backward pass.

    Attributes:
        rules: for each capture whose rule is asked, the parameters' ids by their names in the layer.
        dense: the ids of parameters whose rows autograd computes.
        sites: for each node whose rows are taken, the edges.
    """

    rules: dict[int, dict[str, int]] = field(default_factory=dict)
    dense: list[int] = field(default_factory=list)
    sites: dict[int, list[Target]] = field(default_factory=dict)

    def nodes(self) -> set[int]:
        """Return the nodes at which rows are taken from gradients."""
        return self.rules.keys() | self.sites.keys()

    def targets(self, graph: Graph) -> list[int]:
        """Return the ids of parameters that a backward pass must go down to, so that it comes by all sites.

        Gradients of other parameters are not computed.
        """
        wanted = dict.fromkeys(self.dense)
        for node, targets in self.sites.items():
            if any(target.called for target in targets) or node not in graph.towards_captures:
                for target in targets:
                    wanted.update(dict.fromkeys(target.parameters))
        return list(wanted)

    def events(self) -> dict[int, int]:
        """Return how often each parameter is heard of in one backward pass, at the most."""
        events: dict[int, int] = {}
        for names in self.rules.values():
            for parameter in names.values():
                events[parameter] = events.get(parameter, 0) + 1
        for targets in self.sites.values():
            for target in targets:
                for parameter in target.parameters:
                    events[parameter] = events.get(parameter, 0) + 1
        return events


def plan_rows(
    graph: Graph, parameters: Mapping[int, Tensor], declined: Declined, *, prefer_rules: bool = False
) -> Plan:
    """Plan backward passes of one loss each.

    Args:
        graph: the output's.
        parameters: by id.
        declined: what rules do not cover.
        prefer_rules: ask a rule wherever there is one; otherwise only where what it gives is smaller than the
            parameter's gradient, which autograd computes faster.
    """
    plan = Plan()
    names = {capture: _names(graph, capture, declined) for capture in graph.captures}
    for parameter, uses in graph.uses.items():
        captures = {use.capture for use in uses}
        if all(capture is not None and parameter in names[capture].values() for capture in captures):
            elements = sum(graph.nodes[capture].call.elements for capture in captures if capture is not None)
            if (prefer_rules or elements < parameters[parameter].numel()) and not parameters[parameter]._backward_hooks:
                _ask(plan, captures, parameter, names)
                continue
        plan.dense.append(parameter)
    return plan


def plan_batch(
    graph: Graph, parameters: Mapping[int, Tensor], declined: Declined, layouts: Layouts, independence: Independence
) -> Plan:
    """Plan backward passes of one loss for each element of the batch.

    Raises:
        ValueError: the elements of the batch are not independent.
        EntangledError: some parameters' rows do not come apart in passes for the whole batch.
    """
    plan = Plan()
    names = {capture: _names(graph, capture, declined) for capture in graph.captures}
    mixing = mixing_captures(graph, layouts)
    finder = TargetFinder(graph, layouts, independence)
    for parameter, uses in graph.uses.items():
        for use in uses:
            capture = use.capture
            if capture is not None and capture not in layouts.found:
                continue  # its outputs are not used
            if capture is None or capture in mixing or parameter not in names[capture].values():
                finder.find(use, parameter)
            else:
                _ask(plan, {capture}, parameter, names)
    if finder.entangled:
        raise EntangledError(finder.entangled)
    plan.sites = finder.sites
    return plan


def changed_layers(graph: Graph) -> Declined:
    """Return the captures whose layers have changed since they were called, so that rules would speak of others."""
    changed = [capture for capture in graph.captures if graph.nodes[capture].call.has_changed()]
    return {(capture, name) for capture in changed for name in _names(graph, capture, ())}


def _ask(plan: Plan, captures: Collection[int | None], parameter: int, names: Mapping[int, dict[str, int]]) -> None:
    for capture in captures:
        if capture is not None:
            own = plan.rules.setdefault(capture, {})
            own.update((name, found) for name, found in names[capture].items() if found == parameter)


def _names(graph: Graph, capture: int, declined: Declined) -> dict[str, int]:
    layer = graph.nodes[capture].call.layer
    pairs = layer.named_parameters(remove_duplicate=False) if layer._modules else layer._parameters.items()
    return {name: id(p) for name, p in pairs if p is not None and (capture, name) not in declined}
