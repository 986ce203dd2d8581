"""The parameters that a computation really reaches, and their gradients as autograd itself would give them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["accumulate", "leaves_of", "without_hooks"]


def leaves_of(outputs: Iterable[Tensor], but: Iterable[Tensor] = ()) -> list[nn.Parameter]:
    """Return the leaves whose gradients would come out of outputs, in the order in which they are found.

    They are parameters of a module as a rule; any other leaf that requires a gradient is treated as one.

    Args:
        outputs: with their graph.
        but: leaves to be left out.
    """
    left = {id(each) for each in but}
    nodes = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen, found = set(nodes), dict[int, nn.Parameter]()
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in left:
            found[id(leaf)] = leaf
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return list(found.values())


@contextlib.contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let hooks on parameters rest, which are for a whole gradient and not for what one part adds to it."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add gradients to ``.grad`` as a backward pass does, which calls hooks on the parameters once."""
    if gradients:
        torch.autograd.backward(list(gradients), list(gradients.values()))
