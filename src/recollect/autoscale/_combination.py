"""Rows of the halo that are combined from histories and from what the mini-batch itself tells of them.

With B the mini-batch and N its neighbours outside, a layer's input for a node i of N is

    ẑ_i = (1 - β_i) z_i + β_i z̃_i,

z_i from the history and z̃_i the layer before, computed for i from the rows of B and from those of N, which are combined
themselves. On the way back the same is done with gradients ("LMC: Fast Training of GNNs via Subgraph Sampling with
Provable Convergence", arXiv 2302.00924, section 4: equations 8 to 10 forward, 11 to 13 backward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect._torch import Autocast, autocast_as, autocast_now
from recollect._transfer import sent
from recollect._util._tree import tensors_of
from recollect.autoscale._compensation import BACKWARD_TWICE, Compensation, other_weights
from recollect.autoscale._conditions import blank_of, inputs_of
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._network import State
from recollect.autoscale._outside import matches
from recollect.autoscale._separable import Blank, Edges, Form, way_of
from recollect.autoscale.loader._outward import Outward
from recollect.frames import in_backward

__all__ = ["Combination", "CombinedPass"]

Score = Literal["1", "x", "x^2", "2x-x^2", "sin(x)"]

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "1": torch.ones_like,
    "x": lambda x: x,
    "x^2": lambda x: x * x,
    "2x-x^2": lambda x: x * (2 - x),
    "sin(x)": torch.sin,
}


@dataclass(frozen=True)
class Combination:
    """How far fresh rows take the place of rows from histories: β_i = alpha · score(x_i).

    x_i is the share of a node's edges that the mini-batch has, deg_local / deg_global: of its in-edges those from the
    mini-batch and its neighbours for embeddings, of its out-edges those to them for gradients. Functions are those of
    "LMC" (arXiv 2302.00924, appendix A).

    Attributes:
        alpha: in [0, 1]; 0 leaves histories as they are.
        score: of x.

    Raises:
        ValueError: one is out of its range.

    Example:
        >>> from recollect.autoscale import Combination
        >>> from recollect.models import GCN
        >>> model = GCN(100, 5, 8, 3, num_layers=2, compensate=True, combine=Combination(alpha=0.8, score="x"))
        >>> model.combine
        Combination(alpha=0.8, score='x')
    """

    alpha: float = 1.0
    score: Score = "x^2"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, but must be in [0, 1]")
        if self.score not in get_args(Score):
            raise ValueError(f"score is {self.score!r}, but must be one of {', '.join(map(repr, get_args(Score)))}")

    def betas(self, share: Tensor) -> Tensor:
        """Return β of each node, of the same shape, from the share of its edges that the mini-batch has."""
        return self.alpha * _SCORES[self.score](share)


class CombinedPass(Compensation):
    """One mini-batch's pass, whose halo is combined from histories and fresh rows, forward and backward.

    The out-neighbours T of the batch run through the layers beside it, in evaluation mode and without gradients, by the
    edges that the mini-batch has of them. Halo rows without an edge from the batch come from histories alone.

    Args:
        combination: gives β.
        x: features of the batch and its halo [B + halo, in_channels].
        exchange: moves rows of ``histories``.
        *arguments: those of :class:`Compensation`.
    """

    def __init__(self, combination: Combination, x: Tensor, exchange: Exchange, *arguments: Any) -> None:
        super().__init__(*arguments)
        outward = self._outward
        if outward.share is None:
            raise ValueError(
                "combine= needs the edges among the nodes outside of the mini-batch: give the loader "
                'outward="induced", or "complete" for layers that are no sums over edges'
            )
        self._exchange = exchange
        self._forward, self._backward = combination.betas(outward.share).to(x).unsqueeze(-1)
        self._state: State = self._inputs  # that the layers have left for T
        self._given: dict[int, Tensor] = {}  # by layer, gradients of T's rows of its output, combined
        size, targets = self._batch.size, outward.num_targets
        own, halo = x[:size], x[size:]
        self._known = targets + size
        # Where T and the other nodes are among the halo, which has their rows: found where the numbers are, the host.
        in_halo, place = matches(self._batch.n_id[size:].to(outward.n_id.device), outward.n_id)
        chosen = (place < targets).nonzero().squeeze(1)
        self._in_halo, self._place, self._targets_in_halo, self._targets = (
            sent(found, x.device) for found in (in_halo, place, in_halo[chosen], place[chosen])
        )
        rows = own.new_empty(outward.n_id.numel(), own.size(1))
        if self._place.numel() < rows.size(0) - size:
            if "x" not in outward.nodes:
                raise ValueError("combine= needs the features of nodes outside: the loader's graph has no x")
            rows.copy_(outward.nodes["x"])
        rows[targets : self._known] = own.detach()
        rows[self._place] = halo.detach()[self._in_halo]
        self._rows = {0: rows}  # by layer, its input for all nodes of `outward`

    @staticmethod
    def _reads(outward: Outward) -> bool:
        """See :class:`Compensation`: whatever the edges are, rows are combined with those of histories."""
        return True

    def follow(self, layer: int, out: Tensor, before: State, state: State) -> tuple[Tensor, State]:
        """Take a layer's output for the batch, and run it for the nodes outside too.

        Raises:
            NotImplementedError: see :meth:`Compensation.follow`; and a layer but the first leaves its output in the
                state.
        """
        backward = torch.is_grad_enabled() and out.requires_grad
        if layer and backward:
            self._check_state(layer, out, before, state)
            if any(tensor is out for value in state.values() for tensor in tensors_of(value)):
                raise NotImplementedError(
                    f"layer {layer} leaves its output in its state for what comes after the last layer (jumping "
                    "knowledge), and what that does to nodes outside is not known in a mini-batch: leave out combine="
                )
            if not in_backward():
                self._gradients.table(layer, out.size(1))
        if layer == self._model.num_layers - 1:
            return (_Completed.apply(out, _Way(self, layer, None)) if backward else out), state  # type: ignore[no-untyped-call]
        after = dict(self._state)
        with self._plain(), torch.no_grad():
            fresh = self._model.run_layer(layer, self._rows[layer], self._edges.adj_t, after)
        if backward:
            self._check_form(layer + 1, out, state)
        if layer == 0 or not backward:
            del self._rows[layer]
        self._state = after
        targets = self._outward.num_targets
        others = self._outside.embeddings(layer).to(fresh)
        combined = torch.lerp(others[:targets], fresh, self._forward.to(fresh))
        self._rows[layer + 1] = torch.cat([combined, out.detach().to(fresh), others[targets:]])
        return out, state

    def between(self, layer: int, out: Tensor) -> Tensor:
        """Return the input of the next layer [B + halo, channels], and push the batch's rows."""
        x = self._exchange.swap(self._histories[layer], out, self._batch)
        halo = x[self._batch.size :].detach()
        halo[self._in_halo] = self._rows[layer + 1][self._place].to(halo)
        x = torch.cat([x[: self._batch.size], halo])
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        joined: Tensor = _Completed.apply(x, _Way(self, layer, blank_of(self._inputs, self._state)))  # type: ignore[no-untyped-call]
        return joined

    def complete(self, layer: int, grad: Tensor, blank: Blank | None, autocast: Autocast) -> Tensor:
        """Return the gradient of a layer's output, for the batch and, behind it, whatever came for its halo."""
        size, targets = self._batch.size, self._outward.num_targets
        own = grad[:size]
        fresh = None
        if blank is not None:
            given = self._given.pop(layer + 1)
            rows = self._rows.pop(layer + 1)
            with self._plain(), autocast_as(autocast), torch.enable_grad():
                rows = rows.detach().requires_grad_()
                out = self._model.run_layer(layer + 1, rows, self._edges.adj_t, blank(targets))
                found = None
                if out.requires_grad:
                    (found,) = torch.autograd.grad(out, rows, given.to(out), allow_unused=True)
            found = torch.zeros_like(rows) if found is None else found
            own = own + found[targets : self._known].to(own)
            fresh = found[:targets].to(grad)
            fresh.index_add_(0, self._targets, grad[size:][self._targets_in_halo])
        if layer:
            self._keep(layer, own, fresh)
        return torch.cat([own, grad[size:]])

    def _keep(self, layer: int, own: Tensor, fresh: Tensor | None) -> None:
        """Combine what the layer below is given for T, and push the batch's rows."""
        targets = self._outward.num_targets
        known = self._outside.gradients(layer)
        if known is None:
            old = own.new_zeros(targets, own.size(1))
        else:
            rows, trust = known
            old = rows.to(own) * trust.to(own)
        self._given[layer] = old if fresh is None else torch.lerp(old, fresh, self._backward.to(old))
        self._gradients.push(layer, own, self._batch.n_id[: self._batch.size], self._batch.rows)

    def _check_form(self, layer: int, x: Tensor, state: State) -> None:
        """Raise unless the edges are all that the layer's gradient by its sources needs."""
        if self._outward.complete:
            self._check_apart_from_state(layer, x, blank_of(self._inputs, state))
        elif layer not in self._ways and self._outward.num_targets:
            outward = self._outward.from_batch(self._batch.size)
            inputs = inputs_of(self._given_inputs, outward)
            edges = Edges(outward._replace(value=other_weights(layer, outward.value)))
            with self._plain():
                way = way_of(self._model, layer, x, edges, inputs, blank_of(inputs, state), [Form.EDGES])
            self._note(layer, way)


class _Way:
    """What completes the gradient of a layer's output when it has come."""

    __slots__ = ("_autocast", "_blank", "_done", "_layer", "_of")

    def __init__(self, of: CombinedPass, layer: int, blank: Blank | None) -> None:
        self._of, self._layer, self._blank = of, layer, blank
        self._autocast = autocast_now()
        self._done = False

    def __call__(self, grad: Tensor) -> Tensor:
        if self._done:
            raise RuntimeError(BACKWARD_TWICE)
        self._done = True
        return self._of.complete(self._layer, grad, self._blank, self._autocast)


class _Completed(torch.autograd.Function):
    """The identity, whose gradient is completed on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way(grad), None
