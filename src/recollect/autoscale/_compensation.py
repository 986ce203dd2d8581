"""Gradients that a mini-batch's nodes get through nodes outside of it.

In a mini-batch B a node j is a source of nodes outside of B too, and their part of the gradient,

    Σ_(i outside B) (∂z_l,i / ∂z_(l-1),j)ᵀ V_l,i,    V_l,i = ∂loss / ∂z_l,i,

is lost without compensation. Here z_l is what layer l returns, and V_l comes from a history of gradients: each node's
row is written when its mini-batch goes backward ("LMC: Fast Training of GNNs via Subgraph Sampling with Provable
Convergence", arXiv 2302.00924, section 4). Parameters get gradients from the batch's own rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect._devices import forms_of
from recollect._torch import autocast_as, autocast_now
from recollect._util._tree import Tree, tensors_of
from recollect.autoscale._batch import Batch
from recollect.autoscale._conditions import Plain, blank_of, inputs_of
from recollect.autoscale._network import LayeredGNN, Stage, State
from recollect.autoscale._outside import Outside
from recollect.autoscale._separable import (
    Blank,
    Edges,
    Form,
    Moved,
    Way,
    drawn_like,
    same,
    through_near,
    through_sources,
    transposed,
    way_of,
)
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._outward import Outward
from recollect.frames import in_backward
from recollect.messages import multiplied, transposed_rows

__all__ = ["BACKWARD_TWICE", "Compensation", "Steady", "other_weights"]

Back = Callable[[Tensor], tuple[Tensor, Tensor] | None]
"""From rows [B, channels] to their gradient, and by what factor it counts; or to nothing."""
Through = Callable[[Tensor, Tensor], Tensor | None]
"""From the gradient of a layer's output [B, out_channels], and the rows of its input [B, channels], to theirs."""
Steady = dict[tuple[int, tuple[bool, ...]], bool]
BACKWARD_TWICE = (
    "this mini-batch went backward before, and its gradients are in their histories already; with compensate=True go "
    "backward once for each forward pass, from the sum of all losses"
)
_FORMS = (Form.SUM, Form.SUM_AND_OWN, Form.EDGES)


class Compensation:
    """One mini-batch's pass through the layers, whose backward pass is compensated.

    Args:
        model: gives the layers.
        gradients: histories of V_l; read for the nodes outside, and written for the batch's.
        histories: of z_l, which layers that need all sources of a node outside read.
        batch: the mini-batch.
        outward: its edges to the nodes outside.
        inputs: what the layers' state began with.
        ways: of sending gradients back through each layer, as far as they are known; others are added.
        adj_t: the mini-batch's own edges [B, B + halo].
        steady: by layer and the modes of all modules, whether the layer does the same as in evaluation mode, and
            draws nothing, as far as that is known; others are added.
    """

    def __init__(
        self,
        model: LayeredGNN,
        gradients: GradientHistories,
        histories: list[History],
        batch: Batch,
        outward: Outward,
        inputs: dict[str, Any],
        ways: dict[int, Way],
        adj_t: Tensor,
        steady: Steady,
    ) -> None:
        self._model = model
        self._plain = Plain(model)
        self._autocast = autocast_now()
        self._gradients = gradients
        self._histories = histories
        self._outside = Outside(
            gradients, histories, outward, batch.size, torch.is_grad_enabled(), self._reads(outward)
        )
        self._batch = batch
        self._outward = outward
        self._edges = Edges(outward)
        self._given_inputs = inputs
        self._inputs = inputs_of(inputs, self._edges.by_target if outward.edges.keys() & inputs.keys() else outward)
        self._ways = ways
        self._adj_t = adj_t
        self._steady = steady
        self._below: tuple[Tensor, _Step] | None = None  # the last layer's output, and what happens there
        self._cut: Tensor | None = None  # that of the layer below, if its graph ends there

    @staticmethod
    def _reads(outward: Outward) -> bool:
        """Return whether embeddings of nodes outside are needed."""
        return outward.complete

    def run(self, layer: int, stage: Stage, x: Tensor, before: State) -> tuple[Tensor, State]:
        """Run a layer, without a graph of its input if the gradient by it can be had without one.

        What comes from the batch's own targets and what comes through nodes outside are then sent back together. That
        takes a layer z_i = Σ a_ij g(x_j) that does the same as in evaluation mode: neither dropout nor batch norm.
        """
        self._cut = None
        way, modes = self._ways.get(layer), (layer, self._plain.modes)
        at_once = forms_of(x.device).reads_at_once and self._outward.num_targets
        if way is None or way.form != Form.SUM or self._below is None or not (x.requires_grad and at_once):
            return stage(x)
        random = torch.get_rng_state()
        if modes not in self._steady:
            written = self._plain.versions()
            out, after = stage(x)
            self._steady[modes] = (
                torch.equal(random, torch.get_rng_state())
                and written == self._plain.versions()
                and self._leaves_nothing(out, before, after)
                and self._is_as_in_evaluation(stage, x, out)
            )
            if not self._steady[modes]:
                return out, after
            # What follows rounds in another way: so does every mini-batch, the first of a resumed run too.
        if not self._steady[modes]:
            return stage(x)
        out, after = stage(x.detach())
        alike = out.requires_grad and self._leaves_nothing(out, before, after)
        if alike and torch.equal(random, torch.get_rng_state()):
            self._cut, step = self._below
            step.back = None
            return out, after
        self._steady[modes] = False
        torch.set_rng_state(random)
        return stage(x)

    def _leaves_nothing(self, out: Tensor, before: State, after: State) -> bool:
        known = {id(out), *(id(tensor) for tensor in tensors_of(before))}
        return all(id(tensor) in known for tensor in tensors_of(after))

    def _is_as_in_evaluation(self, stage: Stage, x: Tensor, out: Tensor) -> bool:
        with self._plain(), torch.no_grad():
            return same(out.detach(), stage(x.detach())[0])

    def follow(self, layer: int, out: Tensor, before: State, state: State) -> tuple[Tensor, State]:
        """Take a layer's output and the state that it left; return both so that backward passes through here.

        Raises:
            NotImplementedError: the layer left more in its state than its output, with a gradient; or the next layer is
                no sum over edges, and there are not all edges that it needs.
        """
        if not (torch.is_grad_enabled() and out.requires_grad):
            self._below = None
            return out, state
        if layer:
            self._check_state(layer, out, before, state)
        last = layer == self._model.num_layers - 1
        push = self._gradients.push if layer else None
        if layer and not in_backward():
            self._gradients.table(layer, out.size(1))
        back = None
        if not last and self._outward.num_targets:
            back = self._back(layer + 1, out, blank_of(self._inputs, state))
        through = None if self._cut is None else self._through(layer, blank_of(self._inputs, before))
        step = _Step(layer, self._batch, push, back, through)
        joined: Tensor = _Join.apply(out, self._cut, step)  # type: ignore[no-untyped-call]
        # Not behind the last layer: the graph, which holds this pass, would be held by it, and never be freed.
        self._below, self._cut = None if last else (joined, step), None
        if layer:
            tree = Tree(state)
            state = tree.build([joined if tensor is out else tensor for tensor in tree.tensors])
        return joined, state

    def _back(self, layer: int, x: Tensor, blank: Blank) -> Back:
        """Return what takes the batch's rows of a layer's input to their gradient through the nodes outside."""
        autocast, way = self._autocast, self._way(layer, x, blank)

        def back(own: Tensor) -> tuple[Tensor, Tensor] | None:
            by_source = way.form in (Form.SUM, Form.SUM_AND_OWN)
            known = self._outside.sums(layer, self._edges, True) if by_source else self._outside.gradients(layer)
            if known is None:
                return None
            given, trust = known
            with self._plain(), autocast_as(autocast):
                if way.form == Form.ANY:
                    found = self._through_all(layer, own, given, blank)
                else:
                    send = through_near if by_source else transposed
                    found = send(self._model, layer, way, own, given, self._edges, blank)
            return None if found is None else (found, trust)

        return back

    def _through(self, layer: int, blank: Blank) -> Through:
        """Return what takes the gradient of a layer's output, and the rows of its input, to their gradient."""
        autocast, way = self._autocast, self._ways[layer]

        def through(grad: Tensor, own: Tensor) -> Tensor | None:
            given = multiplied(self._inward, grad)
            known = self._outside.sums(layer, self._edges, False, grad.dtype) if self._outward.num_targets else None
            if known is not None:
                sums, trust = known
                given.addcmul_(sums, trust.to(grad))
            with self._plain(), autocast_as(autocast):
                return through_sources(self._model, layer, way, own, given, self._edges, blank)

        return through

    @cached_property
    def _inward(self) -> Tensor:
        """The batch's edges to itself, by source [B, B]."""
        return transposed_rows(self._adj_t, self._batch.size)

    def _way(self, layer: int, x: Tensor, blank: Blank) -> Way:
        if self._outward.complete:
            self._check_apart_from_state(layer, x, blank)
            return Way(Form.ANY)
        if layer not in self._ways:
            edges = Edges(self._outward._replace(value=other_weights(layer, self._outward.value)))
            with self._plain():
                self._note(layer, way_of(self._model, layer, x, edges, self._inputs, blank))
        return self._ways[layer]

    def _note(self, layer: int, way: Way) -> None:
        """Keep how a layer's gradient is sent back, if that can be done by the edges that there are."""
        if way.form == Form.ANY:
            raise NotImplementedError(
                f"layer {layer} of {type(self._model).__name__} is none of {', '.join(f.value for f in _FORMS)}: "
                "what a source does to a target depends on the target's other sources. Apply the activation (and "
                "norm) at the beginning of the next layer in the place of the end of this one, and divide by "
                'degrees with weights of edges; or give the loader outward="complete", which brings all edges of '
                "the nodes outside"
            )
        self._ways[layer] = way

    def _check_apart_from_state(self, layer: int, x: Tensor, blank: Blank) -> None:
        """Raise if the gradient depends on what earlier layers left for the nodes outside, which is not known here."""
        if layer in self._ways or not self._outward.col.numel():
            return
        generator = torch.Generator().manual_seed(layer)

        def drawn(targets: int) -> State:
            tree = Tree({name: value for name, value in blank(targets).items() if name not in self._inputs})
            others: State = tree.build([drawn_like(tensor, generator) for tensor in tree.tensors])
            return self._inputs | others

        with self._plain():
            own, moved = drawn_like(x, generator), Moved(self._model, generator)
            rows = torch.cat([own.new_zeros(self._outward.num_targets, own.size(1)), own])
            rows = torch.cat([rows, own.new_zeros(self._outward.n_id.numel() - rows.size(0), own.size(1))])
            with torch.no_grad():
                out = moved.run_layer(layer, rows, self._outward.adj_t(), blank(self._outward.num_targets))
            given = drawn_like(out, generator)
            found = [self._through_all(layer, own, given, state, moved) for state in (blank, drawn)]
        if not same(*found):
            raise NotImplementedError(
                f"layer {layer} of {type(self._model).__name__} reads from its state what earlier layers left for a "
                "target, and what a source does to the target depends on it; of nodes outside of a mini-batch that is "
                "not known. With compensate=True such a term is added after all that is not linear, or comes from an "
                "attribute of the graph"
            )
        self._ways[layer] = Way(Form.ANY)

    def _through_all(
        self, layer: int, own: Tensor, given: Tensor, blank: Blank, model: Moved | None = None
    ) -> Tensor | None:
        """Return the same of any layer, by all edges of the nodes outside; other sources come from the history."""
        outward = self._outward
        targets = outward.num_targets
        others = self._outside.embeddings(layer - 1).to(own)
        with torch.enable_grad():
            own = own.detach().requires_grad_()
            x = torch.cat([others[:targets], own, others[targets:]])
            out = (model or self._model).run_layer(layer, x, outward.adj_t(), blank(targets))
            return torch.autograd.grad(out, own, given.to(out), allow_unused=True)[0] if out.requires_grad else None

    def _check_state(self, layer: int, out: Tensor, before: State, state: State) -> None:
        old = {id(tensor) for tensor in tensors_of(before)}
        for name, value in state.items():
            for tensor in tensors_of(value):
                if tensor is not out and id(tensor) not in old and tensor.requires_grad:
                    raise NotImplementedError(
                        f"layer {layer} left a tensor of shape {list(tensor.shape)} with a gradient in "
                        f"state[{name!r}], whose gradient through nodes outside of the mini-batch has no history; with "
                        "compensate=True layers after the first may leave there what they return, and nothing else "
                        "that they computed"
                    )


def other_weights(layer: int, value: Tensor) -> Tensor:
    """Return other weights of edges: those that are 1, or 0, in this mini-batch may be others in the next."""
    return (drawn_like(value, torch.Generator().manual_seed(layer)).abs() + 0.5).to(value)


class _Step:
    """What happens at the output of a layer when its gradient has come.

    Attributes:
        back: gives what comes through nodes outside from the next layer, unless that was sent back already.
        through: gives the gradient of the layer's input, if its graph ends there.
    """

    __slots__ = ("_batch", "_done", "_layer", "_push", "back", "through")

    def __init__(
        self,
        layer: int,
        batch: Batch,
        push: Callable[..., None] | None,
        back: Back | None,
        through: Through | None,
    ) -> None:
        self._layer = layer
        self._batch = batch
        self._push = push
        self.back = back
        self.through = through
        self._done = False

    def __call__(self, grad: Tensor, own: Tensor) -> Tensor:
        if self._done:
            raise RuntimeError(BACKWARD_TWICE)
        self._done = True
        extra = None if self.back is None else self.back(own)
        if extra is not None:
            rows, trust = extra
            grad = torch.addcmul(grad, rows.to(grad), trust.to(grad))
        if self._push is not None:
            self._push(self._layer, grad, self._batch.n_id[: self._batch.size], self._batch.rows)
        return grad


class _Join(torch.autograd.Function):
    """The identity, whose gradient is completed on the way back, and sent to the layer below if its graph ends."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, below: Tensor | None, step: _Step) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(out, below)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        out, below = ctx.saved_tensors
        grad = ctx.step(grad, out)
        return grad, None if ctx.step.through is None else ctx.step.through(grad, below), None
