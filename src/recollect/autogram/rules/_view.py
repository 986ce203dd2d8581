"""What the rules share: how tensors are seen, summed and widened.

Letters: m objectives, r rows of inputs (m, or 1 where all objectives share them), * the dimensions of one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._factors import Factor, Rows
from recollect.autogram._registry import Rule, Sharing

__all__ = ["along_batch", "along_positions", "bias_rows", "needs", "one_input", "sum_to", "wide"]


def one_input(formula: Callable[[Any, Tensor, Tensor], Mapping[str, Factor]]) -> Rule:
    """Return the rule of a layer with one input and one output from its ``formula(layer, x, grad)``."""

    @functools.wraps(formula)
    def rule(layer: Any, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> Mapping[str, Factor]:
        (grad,) = grads
        return {} if grad is None else formula(layer, inputs[0], grad)

    return rule


def needs(layer: nn.Module, name: str) -> bool:
    """Whether the layer has a parameter of this name, no parametrization of it, and it wants a gradient."""
    parameter = layer._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it has less precision than that, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def sum_to(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Sum over all dimensions but the first and those ``kept``, in at least float32."""
    kept = tuple(dim % tensor.ndim for dim in kept)
    dropped = [dim for dim in range(1, tensor.ndim) if dim not in kept]
    summed = [dim for dim in dropped if tensor.shape[dim] != 1]
    total = wide(tensor).sum(summed, keepdim=True) if summed else wide(tensor)  # an empty list would mean all of them
    return total.squeeze(dropped)  # without copying what is no sum


def bias_rows(layer: nn.Module, grad: Tensor, *kept: int) -> dict[str, Factor]:
    """Return the factor of ``bias``, if the layer needs one: gradients [m, *] summed to the dimensions ``kept``."""
    return {"bias": Rows(sum_to(grad, kept))} if needs(layer, "bias") else {}


def along_positions(behind: Callable[[Any], int] = lambda layer: 1) -> Sharing:
    """Return the sharing of a layer that works along its last axes alone: so many, as ``behind(layer)`` says."""

    def sharing(layer: Any, inputs: tuple[Any, ...], axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
        (axis,) = axes
        independent = axis is not None and axis < inputs[0].dim() - behind(layer)
        return (axis,) * len(inputs) if independent else None

    return sharing


def along_batch(dims: int | None = None) -> Sharing:
    """Return the sharing of a layer whose elements are along the first axis.

    Args:
        dims: with fewer axes than so many there is a single element; None: any number.
    """

    def sharing(layer: Any, inputs: tuple[Any, ...], axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
        independent = set(axes) <= {0, None} and (dims is None or inputs[0].dim() >= dims)
        return (0,) * len(inputs) if independent else None

    return sharing
