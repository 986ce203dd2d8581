"""A recurrent layer in one direction, over all its steps: forward, backward, and what that says of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recollect.autogram._factors import Factor, NotCovered, Outer, Rows
from recollect.autogram._products import has_onednn, multiplier, product
from recollect.autogram.rules._cells import CELLS
from recollect.autogram.rules._view import needs, wide

__all__ = ["Direction"]


class Direction:
    """The steps of one layer in one direction.

    Forward is torch's own function, which does what the layer did. Backward, only what goes from step to step is done
    by step: a product with the hidden state's weights, and a few multiplications.

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
        self._from_input, self._input_bias = self._weights("ih")
        self._from_hidden, self._hidden_bias = self._weights("hh")
        self._projection = self._weights("hr")[0] if f"weight_hr{suffix}" in layer._parameters else None

    def _weights(self, which: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = (self._layer._parameters.get(f"{kind}_{which}{self._suffix}") for kind in ("weight", "bias"))
        if weight is None:
            raise NotCovered("parametrized weights of a recurrent layer")
        return wide(weight.detach()), None if bias is None else wide(bias.detach())

    def ahead(self, x: Tensor, state: Sequence[Tensor], known: Tensor | None) -> Tensor:
        """Return the hidden states [r, T, N, H].

        Args:
            x: the inputs [r, T, N, I].
            state: the first state, [r, N, H] each; () for zeros.
            known: the hidden states, where somebody has kept them.
        """
        gates, hidden = self._from_hidden.shape
        sizes = (hidden, gates // self._cell.gates)[: self._cell.states]
        rows, steps, elements, _ = x.shape
        rows = max(rows, *(h.shape[0] for h in state), 1)
        self._first = [h.expand(rows, -1, -1) for h in state] or [x.new_zeros(rows, elements, size) for size in sizes]
        self._x = x
        self._order = range(steps)[:: -1 if self._backward else 1]
        states = x.new_empty(rows, steps + 1, elements, hidden)
        past, after = (slice(1, None), slice(-1)) if self._backward else (slice(-1), slice(1, None))
        self._before = states[:, past]
        self._before[:, self._order[0]] = self._first[0]
        return states[:, after].copy_(self._run() if known is None else known)

    def _run(self) -> Tensor:
        """Return the hidden states [r, T, N, H] as torch's own function computes them."""
        weights = [self._from_input, self._from_hidden, self._input_bias, self._hidden_bias, self._projection]
        given = [weight for weight in weights if weight is not None]
        # On a GPU torch asks for weights that lie one behind the other, and warns if they do not.
        flat = torch.split(torch.cat([weight.flatten() for weight in given]), [weight.numel() for weight in given])
        laid = [part.view_as(weight) for part, weight in zip(flat, given, strict=True)]
        state = [h.flatten(0, 1).unsqueeze(0) for h in self._first]
        first = state if self._cell.states > 1 else state[0]
        x = self._x.expand(len(self._first[0]), -1, -1, -1).transpose(0, 1)
        given_x = (x.flip(0) if self._backward else x).flatten(1, 2)  # [T, r N, I]
        found = self._cell.hidden(given_x, first, laid, self._input_bias is not None, 1, 0.0, False, False, False)[0]
        found = found.view(*x.shape[:3], -1)
        return (found.flip(0) if self._backward else found).transpose(0, 1)

    def back(self, m: int, grads: Tensor | None, ends: Sequence[Tensor | None], is_lowest: bool) -> Tensor | None:
        """Return the inputs' gradients [m, T, N, I] from those of all hidden states and of the last state.

        Args:
            m: the number of objectives.
            grads: [m, T, N, H]; None for zeros.
            ends: [m, N, H] for each tensor of the state; None for zeros.
            is_lowest: whether nobody asks for the inputs' gradients.
        """
        cell, apart = self._cell, self._cell.apart * self._size
        cells = self._first[1] if cell.states > 1 else None
        slopes = cell.slopes(self._gates(), self._before, cells, self._order, self._projection is not None)
        rows, *sizes, width = slopes.gates.shape
        found = slopes.gates if rows == m else slopes.gates.new_empty(m, *sizes, width)
        dh, *rest = (
            h.new_zeros(m, *h.shape[1:]) if end is None else end.clone(memory_format=torch.contiguous_format)
            for h, end in zip(self._first, ends, strict=True)
        )
        dc, shape = rest[0] if rest else None, dh.shape
        outputs = None if self._projection is None else dh.new_empty(m, *sizes, shape[-1])
        by_hidden = found[..., apart:]
        back, before_step = cell.back(slopes, found), by_hidden.unbind(1)
        steps = None if grads is None else grads.unbind(1)
        multiply = multiplier(before_step[0].flatten(0, 1), self._from_hidden.mT)
        for t in reversed(self._order):
            if steps is not None:
                dh.add_(steps[t])
            inner = dh
            if outputs is not None and self._projection is not None:
                outputs[:, t] = dh
                inner = dh @ self._projection
            past = back(t, inner, dc)
            if t == self._order[0]:
                break  # nobody asks for the first state's
            dh = multiply(before_step[t].flatten(0, 1)).view(shape)
            if past is not None:
                dh.add_(past)
        self._inner, self._by_output, self._by_hidden = slopes.inner, outputs, by_hidden
        self._by_input = torch.roll(found[..., : width - apart], -apart, -1) if apart else by_hidden
        if is_lowest:
            return None
        return product(self._by_input.flatten(0, 2), self._from_input.mT).view(m, *sizes, -1)

    @property
    def _size(self) -> int:
        """The number of elements of a block of gates."""
        return len(self._from_hidden) // self._cell.gates

    def _gates(self) -> Tensor:
        """Return what goes into the gates, [r, T, N, blocks], the input's own first and the hidden state's last."""
        together = (self._cell.gates - self._cell.apart) * self._size
        x, before = (t.flatten(0, 2) for t in (self._x.expand(len(self._before), -1, -1, -1), self._before))
        none = before.new_zeros(len(self._from_hidden))
        of_input, of_hidden = (none if bias is None else bias for bias in (self._input_bias, self._hidden_bias))
        shared, own = slice(0, together), slice(together, None)
        from_input, from_hidden, bias = (
            self._from_input[shared],
            self._from_hidden[shared],
            (of_input + of_hidden)[shared],
        )
        if (
            len(x) > from_hidden.shape[1]
        ):  # one product of both: its factors are fewer to copy than the second one's sums
            gates = product(torch.cat([x, before], 1), torch.cat([from_input, from_hidden], 1), bias)
        else:
            gates = product(x, from_input, bias).addmm_(before, from_hidden.mT)
        apart = len(self._from_hidden) - together
        if apart:
            all_gates = gates.new_empty(len(gates), together + 2 * apart)
            all_gates[:, apart : apart + together], gates = gates, all_gates
            gates[:, :apart] = product(x, self._from_input[own], of_input[own])
            gates[:, apart + together :] = product(before, self._from_hidden[own], of_hidden[own])
        return gates.view(*self._before.shape[:3], -1)

    def factors(self) -> dict[str, Factor]:
        """Return the Jacobians of this direction's parameters; gradients that were found are gone then."""
        factors: dict[str, Factor] = {}
        by_input, by_hidden = self._by_input, self._by_hidden
        sums: dict[int, Tensor] = {}
        for which, grads in (("ih", by_input), ("hh", by_hidden)):
            name = f"bias_{which}{self._suffix}"
            if needs(self._layer, name):
                sums[id(grads)] = rows = grads.sum((1, 2)) if id(grads) not in sums else sums[id(grads)]
                factors[name] = Rows(rows)
        same = by_input is by_hidden
        left = _positions_last(by_hidden) if same else _positions(by_hidden)
        by_output = None if self._by_output is None else _positions(self._by_output)
        for which, side, inputs in (
            ("ih", left if same else _positions(by_input), self._x),
            ("hh", left, self._before),
            ("hr", by_output, self._inner),
        ):
            name = f"weight_{which}{self._suffix}"
            if needs(self._layer, name) and side is not None and inputs is not None:
                factors[name] = Outer(side, _positions(inputs), self._layer.get_parameter(name).shape)
        return factors


def _positions(tensor: Tensor) -> Tensor:
    """Return [r, T, N, d] as [r, positions, one group, d]."""
    return tensor.flatten(1, 2).unsqueeze(2)


def _positions_last(tensor: Tensor) -> Tensor:
    """Return the same with the elements of a position far apart, in the memory of the tensor, as oneDNN wants it."""
    rows = tensor.flatten(1, 2)
    if rows.shape[1] == 1 or not has_onednn(rows) or not tensor.is_contiguous():
        return rows.unsqueeze(2)
    turned = rows.view(rows.shape[0], rows.shape[2], rows.shape[1])
    for row, to in zip(rows.unbind(), turned.unbind(), strict=True):
        to.copy_(row.mT.clone(memory_format=torch.contiguous_format))
    return turned.mT.unsqueeze(2)
