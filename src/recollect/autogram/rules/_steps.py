"""A recurrent layer in one direction, over all its steps: forward, backward, and what that says of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autogram._factors import Factor, NotCovered, Outer, Rows
from recollect.autogram.rules._cells import CELLS, Saved, State
from recollect.autogram.rules._view import needs, wide

__all__ = ["Direction"]


class Direction:
    """The steps of one layer in one direction.

    Args:
        layer: the module that has the parameters.
        mode: the kind of recurrence.
        suffix: what the names of this direction's parameters end in.
        backward: whether it begins with the last step.

    Raises:
        NotCovered: a parametrization gives the weights.
    """

    def __init__(self, layer: nn.Module, mode: str, suffix: str, backward: bool) -> None:
        self._layer = layer
        self._cell = CELLS[mode]
        self._suffix = suffix
        self._backward = backward
        self._from_input = self._weights("ih")
        self._from_hidden = self._weights("hh")
        self._projection = self._weights("hr")[0] if f"weight_hr{suffix}" in layer._parameters else None

    def _weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = (self._layer._parameters.get(f"{kind}_{which}{self._suffix}") for kind in ("weight", "bias"))
        if weight is None:
            raise NotCovered("parametrized weights of a recurrent layer")
        return wide(weight.detach()), None if bias is None else wide(bias.detach())

    def ahead(self, x: Tensor, state: State) -> Tensor:
        """Return the hidden states [T, r, N, H] of inputs [T, r, N, I] and a first state [r, N, H], () for zeros."""
        if not state:
            gates, hidden = self._from_hidden[0].shape
            sizes = (hidden, gates // self._cell.gates)[: self._cell.states]
            state = tuple(x.new_zeros(*x.shape[1:-1], size) for size in sizes)
        self._x = x
        self._order = range(len(x))[:: -1 if self._backward else 1]
        self._saved: list[Saved] = [()] * len(x)
        before, inner, after = ([x] * len(x) for _ in range(3))
        given = F.linear(x, *self._from_input)
        for t in self._order:
            before[t] = state[0]
            state, self._saved[t] = self._cell.ahead(given[t], F.linear(state[0], *self._from_hidden), state)
            inner[t] = state[0]
            if self._projection is not None:
                state = (F.linear(state[0], self._projection), *state[1:])
            after[t] = state[0]
        self._last = state
        self._before, self._inner = torch.stack(before), torch.stack(inner)
        return torch.stack(after)

    def back(self, m: int, grads: Tensor | None, ends: Sequence[Tensor | None]) -> Tensor:
        """Return the inputs' gradients [T, m, N, I] from those of all hidden states and of the last state.

        Args:
            m: the number of objectives.
            grads: [T, m, N, H]; None for zeros.
            ends: [m, N, H] for each tensor of the state; None for zeros.
        """
        zeros = [h.new_zeros(()).expand(m, *h.shape[1:]) for h in self._last]
        state = tuple(zero if end is None else end for zero, end in zip(zeros, ends, strict=True))
        if grads is None:
            grads = zeros[0].expand(len(self._x), *zeros[0].shape)
        by_input, by_hidden, by_output = ([grads] * len(grads) for _ in range(3))
        for t in reversed(self._order):
            dh = by_output[t] = state[0] + grads[t]
            if self._projection is not None:
                dh = dh @ self._projection
            by_input[t], by_hidden[t], state = self._cell.back(self._saved[t], (dh, *state[1:]))
            state = (state[0] + by_hidden[t] @ self._from_hidden[0], *state[1:])
        self._by_input, self._by_hidden, self._by_output = (torch.stack(g) for g in (by_input, by_hidden, by_output))
        return self._by_input @ self._from_input[0]

    def factors(self) -> dict[str, Factor]:
        """Return the Jacobians of this direction's parameters."""
        factors: dict[str, Factor] = {}
        for which, grads, inputs in (
            ("ih", self._by_input, self._x),
            ("hh", self._by_hidden, self._before),
            ("hr", self._by_output, self._inner),
        ):
            name = f"weight_{which}{self._suffix}"
            if needs(self._layer, name):
                factors[name] = Outer(_positions(grads), _positions(inputs), self._layer.get_parameter(name).shape)
            name = f"bias_{which}{self._suffix}"
            if needs(self._layer, name):
                factors[name] = Rows(grads.sum((0, 2)))
        return factors


def _positions(tensor: Tensor) -> Tensor:
    """Return [T, r, N, d] as [r, positions, one group, d]."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(2)
