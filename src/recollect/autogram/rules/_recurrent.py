"""Recurrent layers: at each step linear layers, whose inputs and gradients are computed again.

The layer's own graph does not show what happened inside it. The rule runs the layer once more for the hidden states,
and goes back over the steps for the gates' gradients; no randomness may be in it, so dropout between layers is not
covered.

Letters: m objectives, r rows of inputs (m, or 1 where all objectives share them), T steps, N elements of one call, L
layers, D directions, H hidden elements, I elements of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autogram._factors import Factor, NotCovered
from recollect.autogram.rules._steps import Direction
from recollect.autogram.rules._view import wide

__all__ = ["keeps_output", "recurrent", "recurrent_cell", "recurrent_sharing"]

Factors = dict[str, Factor]


def recurrent_sharing(
    layer: nn.RNNBase, inputs: tuple[Any, ...], axes: tuple[int | None, ...]
) -> tuple[int | None, ...] | None:
    """Elements are along the first or second axis of inputs and outputs, and along the second one of states."""
    own = 0 if layer.batch_first else 1
    batched = inputs[0].dim() == 3 and axes[0] in (own, None) and set(axes[1:]) <= {1, None}
    return (own, 1)[: len(inputs)] if batched else None


def keeps_output(output: Tensor) -> bool:
    """Whether autograd keeps the hidden states: torch's LSTM on the CPU does, by oneDNN, of the last layer's."""
    node: Any = output.grad_fn
    if node is not None and node.name() == "TransposeBackward0":  # batch_first
        node = node.next_functions[0][0]
    return node is not None and node.name() == "MkldnnRnnLayerBackward0"


@torch.no_grad()
def recurrent(
    layer: nn.RNNBase, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...], output: Tensor | None = None
) -> Factors:
    """``torch.nn.RNN``, ``GRU`` and ``LSTM``, that with projections too, of several layers and both directions.

    Args:
        layer: the layer.
        inputs: x [r, T, N, I] (or [r, N, T, I] or [r, T, I]) and, perhaps, the first state, h [r, L D, N, H] or (h, c).
        grads: of the output, [m, T, N, D H], and of the last state.
        output: [r, T, N, H], where it was kept, of a layer in one direction.

    Raises:
        NotCovered: dropout between layers is active.
    """
    if layer.dropout > 0 and layer.training and layer.num_layers > 1:
        raise NotCovered("dropout between recurrent layers")
    x, given = (*inputs, None)[:2]
    batched = x.ndim == 4

    def steps_first(tensor: Tensor) -> Tensor:
        if not batched:
            return wide(tensor).unsqueeze(2)
        return wide(tensor.transpose(1, 2) if layer.batch_first else tensor)

    def layers_first(tensor: Tensor) -> Tensor:
        return wide(tensor if batched else tensor.unsqueeze(2)).transpose(0, 1)

    turns = ("", "_reverse") if layer.bidirectional else ("",)
    names = [[f"_l{k}{turn}" for turn in turns] for k in range(layer.num_layers)]
    stack = [[Direction(layer, layer.mode, name, name.endswith("_reverse")) for name in of_one] for of_one in names]
    states = [layers_first(h) for h in _state(given)]
    grad, ends = _of(steps_first, grads[0]), [_of(layers_first, end) for end in grads[1:]]
    return _run(stack, steps_first(x), states, grad, ends, _of(steps_first, output))


@torch.no_grad()
def recurrent_cell(layer: nn.RNNCellBase, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> Factors:
    """``torch.nn.RNNCell``, ``GRUCell`` and ``LSTMCell``: one step of one layer.

    Args:
        layer: the layer.
        inputs: x [r, N, I] or [r, I] and, perhaps, the state before, h [r, N, H] or (h, c).
        grads: of the state after, [m, N, H].
    """
    x, given = (*inputs, None)[:2]

    def one_layer(tensor: Tensor) -> Tensor:
        return wide(tensor if x.ndim == 3 else tensor.unsqueeze(1)).unsqueeze(0)

    def one_step(tensor: Tensor) -> Tensor:
        return one_layer(tensor).transpose(0, 1)

    steps = Direction(layer, _mode(layer), "", False)
    return _run(
        [[steps]], one_step(x), [one_layer(h) for h in _state(given)], None, [_of(one_layer, g) for g in grads], None
    )


def _mode(cell: nn.RNNCellBase) -> str:
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "GRU" if isinstance(cell, nn.GRUCell) else "LSTM"


def _of(change: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else change(tensor)


def _state(given: Any) -> tuple[Tensor, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _run(
    stack: Sequence[Sequence[Direction]],
    x: Tensor,
    states: Sequence[Tensor],
    grad: Tensor | None,
    ends: Sequence[Tensor | None],
    output: Tensor | None,
) -> Factors:
    """Go through the layers and back.

    Args:
        stack: for each layer, its directions.
        x: [r, T, N, I].
        states: the first states of all directions of all layers, [L D, r, N, H]; empty for zeros.
        grad: the output's gradient, [m, T, N, D H]; None for zeros.
        ends: the gradients of the last states, [L D, m, N, H]; None for zeros.
        output: the hidden states of the last layer's only direction, [r, T, N, H], where they were kept.
    """
    given = [one for one in (grad, *ends) if one is not None]
    if not given:
        return {}
    m, width = (grad.shape[0] if grad is not None else given[0].shape[1]), len(stack[0])
    for k, directions in enumerate(stack):
        known = output if k == len(stack) - 1 and width == 1 else None
        after = [one.ahead(x, tuple(h[k * width + j] for h in states), known) for j, one in enumerate(directions)]
        x = torch.cat(after, -1) if width > 1 else after[0]
    factors: Factors = {}
    for k, directions in reversed(list(enumerate(stack))):
        parts = [None] * width if grad is None else grad.chunk(width, -1)
        befores: list[Tensor] = []
        for j, (one, part) in enumerate(zip(directions, parts, strict=True)):
            last = [None if end is None else end[k * width + j] for end in ends]
            before = one.back(m, part, last, is_lowest=k == 0)
            befores += [] if before is None else [before]
            factors |= one.factors()
        grad = sum(befores[1:], befores[0]) if befores else None
    return factors
