"""What a layer was called with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

__all__ = ["positional", "tensors_among"]


def positional(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return all arguments of a call in the order of the layer's forward, with its defaults."""
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def tensors_among(inputs: tuple[Any, ...]) -> list[Tensor] | None:
    """Return the tensors among the arguments, or None if one is of a kind that no rule knows."""
    leaves = inputs if len(inputs) == 1 else tree_flatten(inputs)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(type(leaf) not in (Tensor, nn.Parameter) or leaf.is_nested for leaf in tensors):
        return None
    return None if len(inputs) == 1 and not tensors else tensors
