"""Nodes at the end of a region: they refuse a second way through what was freed, and let go of long chains evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from recollect._torch import graph_task_id, node_sequence, sequence
from recollect.frames._errors import GraphFreedError, describe
from recollect.frames._modes import local

__all__ = ["Before", "guard"]


class Before:
    """The nodes before a region, held by a node that the region made, to let go of them one after the other.

    A node that Python has seen is freed by a call within the call that frees the node after it: a chain of some
    thousands would overflow the stack.
    """

    __slots__ = ("_nodes", "passes")

    def __init__(self, nodes: list[Any]) -> None:
        self._nodes = nodes
        self.passes: dict[int, bool] = {}  # the backward pass that is running, and whether the region could be rebuilt

    def __del__(self) -> None:
        waiting = local.freed
        waiting.extend(self._nodes)
        if not local.freeing:
            local.freeing = True
            try:
                self._nodes.clear()
                while waiting:
                    waiting.pop()
            finally:
                local.freeing = False


class _Needed(Protocol):
    @property
    def needed(self) -> bool: ...


def guard(
    output: Tensor, begin: int, before: Before, frame: Callable[[], _Needed | None], function: Callable[..., Any]
) -> None:
    """Make a second backward through freed saved tensors an error that names the module.

    Nodes that the region did not make belong to others, who may go backward through them as often as they like.

    Args:
        output: of a region.
        begin: number of the first node that the region made.
        before: what was there before.
        frame: a weak reference to the region's: a node that held it would keep its tokens from being freed.
        function: what the region runs.
    """
    node = output.grad_fn
    if node is None or not begin <= node_sequence(node) < sequence():
        return
    passes = before.passes
    passed = False

    def refuse_if_freed(_: tuple[Tensor, ...]) -> None:
        nonlocal passed
        task = graph_task_id()
        if task not in passes:  # the first of the outputs that this backward pass comes through
            present = frame()
            passes.clear()
            passes[task] = present is not None and present.needed
        if passed and not passes[task]:
            raise GraphFreedError(
                f"{describe(function)}: backward through this part of the graph a second time, but its saved "
                "tensors were freed by the first; pass retain_graph=True to the first backward, or run the "
                "forward pass again"
            )
        passed = True

    refuse_if_freed.before = before  # type: ignore[attr-defined]
    node.register_prehook(refuse_if_freed)
