"""The kinds of recurrence: hidden states of all steps, and how gradients go back through the gates.

With the hidden states known, the gates of all steps are one product. In going back only the gradients of the states
differ from step to step: what they are multiplied with, the slopes, is computed for all steps at once as well, in the
memory of the gates.

Letters: T steps, r rows of inputs, m of gradients (m or 1 = r), N elements of one call, H hidden elements, W = H times
the number of blocks of gates. All of it is by element, and broadcasts from r to m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect._devices import forms_of

__all__ = ["CELLS", "Cell", "Slopes"]

_of_sigmoid = torch.ops.aten.sigmoid_backward
_of_tanh = torch.ops.aten.tanh_backward


@dataclass(slots=True)
class Slopes:
    """What gradients are multiplied with on their way back through the gates.

    Attributes:
        gates: of the gates, [r, T, N, W].
        carry: of the state before, past the gates, [r, T, N, H]; None where nothing goes past.
        cell: of the cell after by the hidden state, [r, T, N, H]; LSTM only.
        inner: the hidden state before it is projected, [r, T, N, H]; only where it is.
    """

    gates: Tensor
    carry: Tensor | None = None
    cell: Tensor | None = None
    inner: Tensor | None = None


Step = Callable[[int, Tensor, Tensor | None], Tensor | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """A kind of recurrence.

    Attributes:
        hidden: torch's own function, from inputs to the hidden states of all steps.
        gates: how many blocks of gates each weight has.
        apart: how many of these, the last ones, do not just add up what input and hidden state give them. The input's
            part stands in front of the others, the hidden state's behind them: there are ``gates + apart`` blocks.
        states: how many tensors the state has: (h,), of an LSTM (h, c).
        slopes: (gates before their functions [r, T, N, W], hidden states before each step [r, T, N, H], the cell at
            first [r, N, H] if there is one, steps in order, whether a projection follows) -> slopes. The gates are
            overwritten.
        back: (slopes, where to write the gates' gradients [m, T, N, W]) -> a function (step, gradient of the hidden
            state [m, N, H], of the cell) -> what of the gradient goes past the gates. It writes a step's gradients of
            the gates, and changes the cell's gradient in place.
    """

    hidden: Callable[..., tuple[Tensor, ...]]
    gates: int
    apart: int
    states: int
    slopes: Callable[[Tensor, Tensor, Tensor | None, range, bool], Slopes]
    back: Callable[[Slopes, Tensor], Step]


def _tanh_(x: Tensor) -> Tensor:
    """Apply tanh in place, to [r, T, ..]: e / (e + 2) with e = exp 2x - 1, exact to rounding for small x too."""
    if not forms_of(x.device).tanh_of_exponentials:
        return x.tanh_()
    for part in x.chunk(8, 1):  # little memory at once
        e = part.mul_(2).clamp_(max=40).expm1_()  # tanh 20 is 1 in float64
        e.div_(e + 2)
    return x


def _tanh_slopes(gates: Tensor, *_: Any) -> Slopes:
    h = _tanh_(gates)
    return Slopes(h.square_().neg_().add_(1))


def _relu_slopes(gates: Tensor, *_: Any) -> Slopes:
    return Slopes(gates.gt_(0))


def _plain_back(slopes: Slopes, out: Tensor) -> Step:
    gates, outs = slopes.gates.unbind(1), out.unbind(1)

    def back(t: int, dh: Tensor, _: Tensor | None) -> None:
        torch.mul(gates[t], dh, out=outs[t])

    return back


def _lstm_slopes(gates: Tensor, _: Tensor, first: Tensor | None, order: range, projects: bool) -> Slopes:
    assert first is not None
    i, f, g, o = gates.chunk(4, -1)
    gates[..., : 2 * i.shape[-1]].sigmoid_()
    _tanh_(g)
    o.sigmoid_()
    cells = first.new_empty(len(first), len(order) + 1, *first.shape[1:])
    before, after = (cells[:, :-1], cells[:, 1:]) if order.step > 0 else (cells[:, 1:], cells[:, :-1])
    before[:, order[0]] = first
    steps = [part.unbind(1) for part in (f, before, after, i, g)]
    for t in order:
        forget, old, new, entry, candidate = (part[t] for part in steps)
        torch.mul(forget, old, out=new).addcmul_(entry, candidate)
    carry = f.clone()
    _of_sigmoid.grad_input(before, f, grad_input=f)
    slope = _of_tanh(i, g)
    _of_sigmoid.grad_input(g, i, grad_input=i)
    g.copy_(slope)
    bounded = _tanh_(after)
    inner = o * bounded if projects else None
    _of_tanh.grad_input(o, bounded, grad_input=slope)
    _of_sigmoid.grad_input(bounded, o, grad_input=o)
    return Slopes(gates, carry, slope, inner)


def _lstm_back(slopes: Slopes, out: Tensor) -> Step:
    assert slopes.carry is not None
    assert slopes.cell is not None
    size = slopes.carry.shape[-1]
    blocks = [torch.unflatten(tensor, -1, (4, size)) for tensor in (slopes.gates, out)]
    three, by_cell = [one[..., :3, :].unbind(1) for one in blocks]
    last, by_hidden = [one[..., 3, :].unbind(1) for one in blocks]
    carry, cell = slopes.carry.unbind(1), slopes.cell.unbind(1)

    def back(t: int, dh: Tensor, dc: Tensor | None) -> None:
        assert dc is not None
        dc.addcmul_(dh, cell[t])
        torch.mul(three[t], dc.unsqueeze(-2), out=by_cell[t])
        torch.mul(last[t], dh, out=by_hidden[t])
        dc.mul_(carry[t])

    return back


def _gru_slopes(gates: Tensor, before: Tensor, *_: Any) -> Slopes:
    n, r, z, hidden_n = gates.chunk(4, -1)  # what goes into the candidate n stands apart, r times the hidden's
    gates[..., n.shape[-1] : 3 * n.shape[-1]].sigmoid_()
    _tanh_(n.addcmul_(r, hidden_n))
    carry = z.clone()
    _of_sigmoid.grad_input(before - n, z, grad_input=z)
    _of_tanh.grad_input(1 - carry, n, grad_input=n)
    slope = n * r
    _of_sigmoid.grad_input(hidden_n.mul_(n), r, grad_input=r)
    hidden_n.copy_(slope)
    return Slopes(gates, carry)


def _gru_back(slopes: Slopes, out: Tensor) -> Step:
    assert slopes.carry is not None
    carry = slopes.carry.unbind(1)
    by_gate, outs = (torch.unflatten(one, -1, (4, carry[0].shape[-1])).unbind(1) for one in (slopes.gates, out))

    def back(t: int, dh: Tensor, _: Tensor | None) -> Tensor:
        torch.mul(by_gate[t], dh.unsqueeze(-2), out=outs[t])
        return dh * carry[t]

    return back


CELLS = {
    "RNN_TANH": Cell(torch.rnn_tanh, 1, 0, 1, _tanh_slopes, _plain_back),
    "RNN_RELU": Cell(torch.rnn_relu, 1, 0, 1, _relu_slopes, _plain_back),
    "LSTM": Cell(torch.lstm, 4, 0, 2, _lstm_slopes, _lstm_back),
    "GRU": Cell(torch.gru, 3, 1, 1, _gru_slopes, _gru_back),
}
