"""Who accounts for which parameter: a rule, autograd itself, or the rows of the nodes where it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from recollect.autogram._inputs import InputLayouts, input_layouts
from recollect.autogram._sites import Stuck, Target, TargetFinder
from recollect.autogram._structure import Layouts
from recollect.autogram._walk import Graph

__all__ = ["Declined", "Plan", "changed_layers", "plan_batch", "plan_rows"]

Declined = Collection[tuple[int, str]]
"""Captures, and the names of parameters of theirs, for which their rule gave nothing."""


@dataclass(slots=True)
class Plan:
    """What is done in a backward pass.

    Attributes:
        rules: for each capture whose rule is asked, the parameters' ids by their names in the layer.
        dense: the ids of parameters whose rows autograd computes.
        sites: for each node whose rows are taken, the edges.
        inputs: for each capture whose rule is asked for rows of several losses at once, where its layer's arguments
            have them apart; None: they have them not, and the gradient is masked for each.
        by_rows: the ids of parameters whose rows do not come apart in such a pass, and why.
        names: of the types of layers whose rules are asked, once somebody wants to know.
    """

    rules: dict[int, dict[str, int]] = field(default_factory=dict)
    dense: list[int] = field(default_factory=list)
    sites: dict[int, list[Target]] = field(default_factory=dict)
    inputs: dict[int, InputLayouts | None] = field(default_factory=dict)
    by_rows: dict[int, Stuck] = field(default_factory=dict)
    names: str | None = None

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
        parameters: those whose rows are wanted, by id.
        declined: what rules do not cover.
        prefer_rules: ask a rule wherever there is one; otherwise only where what it gives is smaller than the
            parameter's gradient, which autograd computes faster.
    """
    plan = Plan()
    names = {capture: _names(graph, capture, declined) for capture in graph.captures}
    for parameter, uses in graph.uses.items():
        if parameter not in parameters:
            continue
        captures = {use.capture for use in uses}
        if all(capture is not None and parameter in names[capture].values() for capture in captures):
            elements = sum(graph.nodes[capture].call.elements for capture in captures if capture is not None)
            if (prefer_rules or elements < parameters[parameter].numel()) and not parameters[parameter]._backward_hooks:
                _ask(plan, captures, parameter, names)
                continue
        plan.dense.append(parameter)
    return plan


def plan_batch(
    graph: Graph, parameters: Mapping[int, Tensor], declined: Declined, layouts: Layouts, bound: int
) -> Plan:
    """Plan backward passes of many losses each, which are apart as these layouts say.

    Args:
        graph: the output's.
        parameters: those that count, by id.
        declined: what rules do not cover.
        layouts: where the losses are apart.
        bound: how many elements of one layer's gradient, masked for every loss, may be held.
    """
    # A hook on a parameter is made for one loss' gradient, not for those of many.
    hooked = {key: Stuck(hooked=True) for key in graph.uses if parameters[key]._backward_hooks}
    plan = Plan(by_rows=hooked)
    names = {capture: _names(graph, capture, declined) for capture in graph.captures}
    inputs = _inputs(graph, layouts, bound)
    while True:
        finder = TargetFinder(graph, layouts, plan.by_rows)
        for parameter, uses in graph.uses.items():
            if parameter in plan.by_rows:
                continue
            for use in uses:
                capture = use.capture
                if capture is not None and capture not in layouts.found:
                    continue  # its outputs are not used
                if capture is None or capture not in inputs or parameter not in names[capture].values():
                    finder.find(use, parameter)
                else:
                    _ask(plan, {capture}, parameter, names)
        if not finder.entangled:
            plan.sites = finder.sites
            plan.inputs = {capture: inputs[capture] for capture in plan.rules}
            return plan
        plan = Plan(by_rows={**plan.by_rows, **finder.entangled})


def _inputs(graph: Graph, layouts: Layouts, bound: int) -> dict[int, InputLayouts | None]:
    """Return where the arguments of captured layers have the losses, for those whose rule may take rows of them."""
    found: dict[int, InputLayouts | None] = {}
    for capture in graph.captures:
        outputs, shapes = layouts.found.get(capture, ()), graph.shapes[capture]
        if capture in layouts.free or all(layout is None for layout in outputs):
            continue
        split = input_layouts(graph.nodes[capture].call, outputs, shapes)
        if split is not None or layouts.batch * sum(shape.numel() for shape in shapes if shape is not None) <= bound:
            found[capture] = split
    return found


def changed_layers(graph: Graph) -> frozenset[tuple[int, str]]:
    """Return the captures whose layers have changed since they were called, so that rules would speak of others."""
    changed = [capture for capture in graph.captures if graph.nodes[capture].call.has_changed()]
    return frozenset((capture, name) for capture in changed for name in _names(graph, capture, ()))


def _ask(plan: Plan, captures: Collection[int | None], parameter: int, names: Mapping[int, dict[str, int]]) -> None:
    for capture in captures:
        if capture is not None:
            own = plan.rules.setdefault(capture, {})
            own.update((name, found) for name, found in names[capture].items() if found == parameter)


def _names(graph: Graph, capture: int, declined: Declined) -> dict[str, int]:
    layer = graph.nodes[capture].call.layer
    pairs = layer.named_parameters(remove_duplicate=False) if layer._modules else layer._parameters.items()
    return {name: id(p) for name, p in pairs if p is not None and (capture, name) not in declined}
