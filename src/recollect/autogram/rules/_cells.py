"""One step of a recurrent layer, and one step of its backward pass, in numbers alone.

``ahead`` goes from what the input and the hidden state give to the gates to the next state, ``back`` from the gradient
of the next state to those of both, and of the state before except for what goes through the hidden state's weights.
Gradients may have more rows (m) than the step itself (1): all is by element, and broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CELLS", "Cell", "Saved", "State"]

State = tuple[Tensor, ...]
"""What goes from step to step: (h,), of an LSTM (h, c)."""

Saved = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of recurrence.

    Attributes:
        gates: how many elements of the gates there are for each of the hidden state.
        states: how many tensors the state has.
        ahead: (gates from the input, gates from the hidden state, state) -> (next state, what ``back`` needs).
        back: (what ``ahead`` saved, gradient of the next state) -> (gradients of the gates from the input, of the gates
            from the hidden state, of the state).
    """

    gates: int
    states: int
    ahead: Callable[[Tensor, Tensor, State], tuple[State, Saved]]
    back: Callable[[Saved, State], tuple[Tensor, Tensor, State]]


def _tanh_ahead(given: Tensor, hidden: Tensor, _: State) -> tuple[State, Saved]:
    h = torch.tanh(given + hidden)
    return (h,), (1 - h * h,)


def _relu_ahead(given: Tensor, hidden: Tensor, _: State) -> tuple[State, Saved]:
    h = torch.relu(given + hidden)
    return (h,), ((h > 0).to(h.dtype),)


def _plain_back(saved: Saved, grads: State) -> tuple[Tensor, Tensor, State]:
    (slope,), (dh,) = saved, grads
    gates = dh * slope
    return gates, gates, (dh.new_zeros(()),)  # nothing of the state goes past the gates


def _lstm_ahead(given: Tensor, hidden: Tensor, state: State) -> tuple[State, Saved]:
    c = state[1]
    i, f, g, o = (given + hidden).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    following = f * c + i * g
    bounded = following.tanh()
    return (o * bounded, following), (i, f, g, o, c, bounded)


def _lstm_back(saved: Saved, grads: State) -> tuple[Tensor, Tensor, State]:
    (i, f, g, o, c, bounded), (dh, dc) = saved, grads
    dc = dc + dh * (o * (1 - bounded * bounded))
    slopes = (dc * (g * i * (1 - i)), dc * (c * f * (1 - f)), dc * (i * (1 - g * g)), dh * (bounded * o * (1 - o)))
    gates = torch.cat(slopes, -1)
    return gates, gates, (dh.new_zeros(()), dc * f)


def _gru_ahead(given: Tensor, hidden: Tensor, state: State) -> tuple[State, Saved]:
    (h,) = state
    given_r, given_z, given_n = given.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = hidden.chunk(3, -1)
    r, z = (given_r + hidden_r).sigmoid(), (given_z + hidden_z).sigmoid()
    n = (given_n + r * hidden_n).tanh()
    return (n + z * (h - n),), (r, z, n, h, hidden_n)


def _gru_back(saved: Saved, grads: State) -> tuple[Tensor, Tensor, State]:
    (r, z, n, h, hidden_n), (dh,) = saved, grads
    dz = dh * ((h - n) * z * (1 - z))
    dn = dh * ((1 - z) * (1 - n * n))
    dr = dn * (hidden_n * r * (1 - r))
    return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), (dh * z,)


CELLS = {
    "RNN_TANH": Cell(1, 1, _tanh_ahead, _plain_back),
    "RNN_RELU": Cell(1, 1, _relu_ahead, _plain_back),
    "LSTM": Cell(4, 2, _lstm_ahead, _lstm_back),
    "GRU": Cell(3, 1, _gru_ahead, _gru_back),
}
