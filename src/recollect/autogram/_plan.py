"""Who accounts for which parameter: a rule, autograd itself, or the rows of the nodes where it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recollect.autogram._independence import Independence
from recollect.autogram._probe import Layouts
from recollect.autogram._sites import is_passed_on, is_product
from recollect.autogram._walk import Graph, Use

__all__ = ["Declined", "Plan", "Target", "plan_batch", "plan_rows"]

Declined = Collection[tuple[int, str]]
"""Captures, and the names of parameters of theirs, for which their rule gave nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """An edge from a node with a batch to something that has none.

    Attributes:
        position: which of the node's edges.
        child: the number of the node that it leads to.
        index: which of that node's outputs.
        shape: of that output.
        parameters: the ids of all parameters that are reached from there.
        transposed: whether it leads to the one parameter transposed, and no further.
        direct: whether it leads to the one parameter itself.
        called: whether the node itself has to be asked for the gradient.
    """

    position: int
    child: int
    index: int
    shape: torch.Size
    parameters: tuple[int, ...]
    direct: bool
    transposed: bool
    called: bool


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
    """
    plan = Plan()
    names = {capture: _names(graph, capture, declined) for capture in graph.captures}
    mixing = _mixing(graph, layouts)
    for parameter, uses in graph.uses.items():
        for use in uses:
            capture = use.capture
            if capture is not None and capture not in layouts.found:
                continue  # its outputs are not used
            if capture is None or capture in mixing or parameter not in names[capture].values():
                _climb(plan, graph, use, layouts, independence)
            else:
                _ask(plan, {capture}, parameter, names)
    return plan


def _ask(plan: Plan, captures: Collection[int | None], parameter: int, names: Mapping[int, dict[str, int]]) -> None:
    for capture in captures:
        if capture is not None:
            own = plan.rules.setdefault(capture, {})
            own.update((name, found) for name, found in names[capture].items() if found == parameter)


def _names(graph: Graph, capture: int, declined: Declined) -> dict[str, int]:
    layer = graph.nodes[capture].call.layer
    pairs = layer.named_parameters(remove_duplicate=False) if layer._modules else layer._parameters.items()
    return {name: id(p) for name, p in pairs if p is not None and (capture, name) not in declined}


def _mixing(graph: Graph, layouts: Layouts) -> set[int]:
    """Return the captures of layers that mix the batch or have none: no rule may take rows of theirs for elements.

    Inside a layer only what is made of its parameters may have a gradient that mixes the batch.
    """
    mixing = {capture for capture in graph.captures if capture in layouts.free}
    for node in layouts.free:
        owner = graph.owners.get(node)
        if owner is not None and owner not in mixing and graph.touches_data(node):
            mixing.add(owner)
    return mixing


def _climb(plan: Plan, graph: Graph, use: Use, layouts: Layouts, independence: Independence) -> None:
    """Go from a use towards the output as long as nodes have no batch, and note where one does."""
    parents = graph.parents()
    start = (use.node, use.position)
    edges = [start]
    seen = set(edges)
    while edges:
        node, position = edges.pop()
        if node not in layouts.found:
            continue  # nothing comes this way
        if node not in layouts.free:
            if (node, position) != start:
                independence.check(graph, use, node, position, layouts)
            targets = plan.sites.setdefault(node, [])
            if all(target.position != position for target in targets):
                targets.append(_target(graph, node, position, layouts))
            continue
        for parent in parents[node]:
            for k, child in enumerate(graph.edges[parent]):
                if child == node and (parent, k) not in seen:
                    seen.add((parent, k))
                    edges.append((parent, k))


def _target(graph: Graph, node: int, position: int, layouts: Layouts) -> Target:
    index = graph.nodes[node].next_functions[position][1]
    number = graph.edges[node][position]
    direct = number in graph.leaves
    transposed = graph.names[number] == "TBackward0" and graph.edges[number][0] in graph.leaves
    at = graph.nodes[node]
    called = not (is_passed_on(at, position) or is_product(at, position, layouts.found[node]))
    return Target(
        position, number, index, graph.shape(number, index), _reached(graph, number), direct, transposed, called
    )


def _reached(graph: Graph, start: int) -> tuple[int, ...]:
    found: dict[int, None] = {}
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if node in graph.leaves:
            found[graph.leaves[node]] = None
            continue
        for child in graph.edges[node]:
            if child >= 0 and child not in seen:
                seen.add(child)
                waiting.append(child)
    return tuple(found)
