"""Parameters that no graph shows: those of backward passes inside of a function's own backward.

A ``torch.autograd.Function`` may run layers where nothing is recorded, and go through them in its backward, which then
accumulates the gradients of their parameters. torch.utils.checkpoint with ``use_reentrant=True`` does so, as do the
reversible blocks of several libraries. Such gradients would be missing in a Gramian, and each of its backward passes
would accumulate them once more. Which parameters these are is known only when a pass comes by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from recollect.autogram._checks import name_of
from recollect.autogram._passes import Job
from recollect.autogram._walk import Graph

__all__ = ["check_checkpoints", "check_functions", "watched"]


def check_checkpoints(graph: Graph, parameters: Collection[int], modules: Sequence[nn.Module]) -> None:
    """Raise if a reentrant checkpoint of torch's is on the way to a parameter, or may have one in it.

    Args:
        graph: the losses'.
        parameters: the ids of those that count.
        modules: the engine's, for their names.

    Raises:
        ValueError: there is one.
    """
    checkpoints = _checkpoints_in(graph)
    if not checkpoints:
        return
    missing = set(parameters) - set(graph.leaves.values())
    behind = _behind(graph, checkpoints)
    if not missing and not behind & graph.leaves.keys():
        return
    places = "its layers' parameters are not"
    if missing:
        names = [name for module in modules for name, p in module.named_parameters() if id(p) in missing]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        places = f"the engine's {', '.join(map(repr, names[:3]))}{more} may be in it, and not"
    raise ValueError(
        f"the losses were computed by torch.utils.checkpoint with use_reentrant=True: {places} in the losses' graph, "
        "and torch lets no gradient through it but by an ordinary backward(). Give use_reentrant=False, or use "
        "recollect.checkpoint"
    )


def check_functions(job: Job, modules: Sequence[nn.Module]) -> None:
    """Go once through the functions of the graph, and raise if one accumulates gradients by itself.

    Args:
        job: whose graph stays.
        modules: the engine's, for their names.

    Raises:
        ValueError: one does; what it would have accumulated is not.
    """
    graph = job.graph
    checkpoints = _checkpoints_in(graph)  # nothing of the engine is behind them: that was checked
    apart = _behind(graph, checkpoints).union(checkpoints)
    ends = [
        GradientEdge(graph.nodes[child], index)
        for node in graph.functions
        if node not in apart
        for child, index in zip(graph.edges[node], graph.indices[node], strict=True)
        if child >= 0
    ]
    if ends:
        with watched(graph, job.parameters, modules):
            torch.autograd.grad(job.output, ends, torch.ones_like(job.output), retain_graph=True, allow_unused=True)


@contextmanager
def watched(graph: Graph, parameters: Mapping[int, Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let no function of the graph accumulate gradients of these parameters.

    Args:
        graph: the losses', through which no other gradients of these parameters are accumulated.
        parameters: by id.
        modules: the engine's, for their names.

    Raises:
        ValueError: one was about to.
    """
    if not graph.functions:
        yield
        return
    functions = ", ".join(dict.fromkeys(graph.kinds[node].__name__ for node in graph.functions))
    thread = threading.get_ident()

    def refuse(parameter: Tensor) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            # Another thread may have its own backward pass. On the host a pass stays in its thread.
            if parameter.device.type != "cpu" or threading.get_ident() == thread:
                raise ValueError(
                    f"the gradient of {name_of(modules, parameter)!r} comes from a backward pass inside of the "
                    f"backward of a torch.autograd.Function (there is {functions}), and is in no graph: the Gramian "
                    "would lack it. Allowed are functions that return all gradients: give the parameter as an argument "
                    "to apply, or use recollect.checkpoint or a reversible layer in place of the function"
                )

        return hook

    accumulators = [(get_gradient_edge(parameter).node, parameter) for parameter in parameters.values()]
    handles = [node.register_prehook(refuse(parameter)) for node, parameter in accumulators]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checkpoints_in(graph: Graph) -> list[int]:
    return [node for node in graph.functions if graph.kinds[node] is CheckpointFunction]


def _behind(graph: Graph, nodes: Sequence[int]) -> set[int]:
    """Return all nodes that these lead to."""
    waiting, found = list(nodes), set()
    while waiting:
        for child in graph.edges[waiting.pop()]:
            if child >= 0 and child not in found:
                found.add(child)
                waiting.append(child)
    return found
