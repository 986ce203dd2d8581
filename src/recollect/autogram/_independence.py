"""What is said of losses that are not apart: an error for a batch dimension that is none, and an explanation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recollect.autogram._choice import Choice
from recollect.autogram._walk import Graph

__all__ = ["check_independence", "explain"]

_REASONS = {
    "unknown": "nothing is known of how {kind} treats the losses' elements",
    "mixed": "{kind} works along the losses' axis",
    "moved": "{kind} picks or places elements along the losses' axis",
    "summed": "{kind} sums over the losses' axis what goes on behind it, which depends on data",
    "met": "{kind} uses what other losses use too",
}


def check_independence(graph: Graph, choice: Choice, modules: Sequence[nn.Module], batch_dim: int) -> None:
    """Raise if elements of a batch are mixed on the way from the losses to parameters.

    Where that cannot be told, as behind an operation that is not known, it raises nothing.

    Args:
        graph: the losses'.
        choice: made for this batch dimension.
        modules: the engine's.
        batch_dim: the engine's.

    Raises:
        ValueError: it is so; the message names modules.
    """
    for stuck in choice.plan.by_rows.values():
        use, lost = stuck.use, stuck.lost
        if use is not None and lost is not None and lost.why in ("mixed", "met"):
            below = _users(graph, modules, [use.node if use.capture is None else use.capture])
            above = _users(graph, modules, [lost.node])
            place = f"after {', '.join(below)}" + (f", in or before {', '.join(above)}" if above else "")
            raise ValueError(
                f"batch_dim={batch_dim} is for modules that treat the elements of a batch independently, but the loss "
                f"of one element depends on other elements; they are mixed {place}. Put something that does not mix "
                "the batch in its place (GroupNorm for BatchNorm, or BatchNorm in eval mode), or leave batch_dim out: "
                "then what is not independent goes by rows (batch_dim='auto'), or all does (batch_dim=None)"
            )


def explain(graph: Graph, choice: Choice, modules: Sequence[nn.Module]) -> str:
    """Return what passes there are, and which parameters go by rows, and why.

    Args:
        graph: the losses'.
        choice: what was chosen for them.
        modules: the engine's.
    """
    losses, names = math.prod(choice.structure.sizes), _parameter_names(modules)
    by_rows = choice.plan.by_rows
    if len(by_rows) == len(graph.uses):
        lines = [f"one backward pass for each of {losses} losses"]
    else:
        passes = "1 backward pass" if choice.passes == 1 else f"{choice.passes} backward passes"
        lines = [f"{passes} of {choice.layouts.batch} losses each for {len(graph.uses) - len(by_rows)} parameters"]
        if by_rows:
            lines.append(f"by rows, a backward pass for each of {losses} losses:")
    for key, stuck in by_rows.items():
        if stuck.hooked:
            lines.append(f"  {names[key]}: it has a hook, which is made for one loss' gradient")
        elif stuck.lost is not None:
            kind = _kind(graph, modules, stuck.lost.node)
            lines.append(f"  {names[key]}: {_REASONS[stuck.lost.why].format(kind=kind)}")
    return "\n".join(lines)


def _kind(graph: Graph, modules: Sequence[nn.Module], node: int) -> str:
    kind = graph.kinds[node]
    name = kind if isinstance(kind, str) else kind.__qualname__
    users = _users(graph, modules, [node]) if node in graph.owners else []
    return f"{name} of {', '.join(users)}" if users else name


def _users(graph: Graph, modules: Sequence[nn.Module], nodes: list[int]) -> list[str]:
    """Return the names of the modules that these nodes belong to, or else the next ones towards the output."""
    names, parents = _names(modules), graph.parents
    seen = set(nodes)
    while nodes:
        found: dict[str, None] = {}
        for node in nodes:
            if node in graph.captures:
                found[names.get(id(graph.nodes[node].call.layer), "a layer")] = None
            for child in graph.edges[node]:
                for leaf in (child, *(graph.edges[child] if child >= 0 else ())):
                    if leaf in graph.leaves:
                        found[names.get(graph.leaves[leaf], "a module")] = None
        if found:
            return list(found)
        nodes = [parent for parent in {p for node in nodes for p in parents[node]} if parent not in seen]
        seen.update(nodes)
    return []


def _names(modules: Sequence[nn.Module]) -> Mapping[int, str]:
    """Return the modules' names, by their ids and their parameters'."""
    names: dict[int, str] = {}
    for module in modules:
        for name, child in module.named_modules():
            shown = f"{name!r} ({type(child).__name__})" if name else type(child).__name__
            names[id(child)] = shown
            for parameter in child._parameters.values():
                if isinstance(parameter, Tensor):
                    names.setdefault(id(parameter), shown)
    return names


def _parameter_names(modules: Sequence[nn.Module]) -> Mapping[int, str]:
    """Return the parameters' names, by their ids; with several modules, each behind its module's number and type."""
    prefixes = [f"{k} ({type(module).__name__}) " if len(modules) > 1 else "" for k, module in enumerate(modules)]
    pairs = zip(prefixes, modules, strict=True)
    return {id(parameter): prefix + name for prefix, module in pairs for name, parameter in module.named_parameters()}
