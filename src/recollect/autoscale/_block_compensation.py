"""Gradients that a mini-batch's nodes get through nodes outside of it, block by block.

A layer of C blocks is y_1 = x_1 + f_1(x_2 + ... + x_C), y_i = x_i + f_i(y_(i-1)). With V_i the loss' gradient by group
i of what the layer returns, that by the output of block i is that by y_i, on all ways in the layer and behind it:

    W_C = V_C,    W_i = V_i + (∂f_(i+1) / ∂y_i)ᵀ W_(i+1).

A node j of the mini-batch B misses in the gradient of a block's input z what nodes outside send to it,

    Σ_(k outside B) (∂f_i(z)_k / ∂z_j)ᵀ W_i,k.

That is added where the block's backward pass ends, from histories of W ("LMC", arXiv 2302.00924, section 4). The rows
z_j are those that the block's frame rebuilds, so that nothing more is kept. The first block of all needs nothing: its
input at the nodes outside is computed from features, and has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect._torch import Autocast, autocast_as, autocast_now
from recollect.autoscale._batch import Batch
from recollect.autoscale._blocks import WEIGHTS, OneBlock, factors_outside, first_input
from recollect.autoscale._compensation import BACKWARD_TWICE, other_weights
from recollect.autoscale._conditions import Plain, inputs_of
from recollect.autoscale._network import LayeredGNN, State
from recollect.autoscale._outside import Outside
from recollect.autoscale._separable import (
    Edges,
    Form,
    Moved,
    Way,
    drawn_like,
    one_more_edge,
    same,
    transposed,
    way_of,
)
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._outward import Outward
from recollect.messages import sparse_csr
from recollect.messages.reach import kind_of

if TYPE_CHECKING:
    from recollect.autoscale._blockwise import BlockwiseGNN

__all__ = ["BlockCompensation", "BlockWays", "LayerCompensation"]

_SUMS = ", ".join(form.value for form in (Form.SUM, Form.SUM_AND_OWN, Form.EDGES))


@dataclass
class BlockWays:
    """How gradients are sent back through the blocks, as far as that is known.

    Attributes:
        of_blocks: by the number of a block, and whether all edges into the nodes outside are there.
        of_kinds: by the kind of a block, and the same.
    """

    of_blocks: dict[tuple[int, bool], Way] = field(default_factory=dict)
    of_kinds: dict[tuple[Any, bool], Way] = field(default_factory=dict)


class BlockCompensation:
    """One mini-batch's pass through the blocks of all layers, whose backward pass is compensated.

    Blocks are numbered ``index * C + group``.

    Args:
        model: gives the blocks.
        gradients: histories of W; read for the nodes outside, and written for the batch's.
        histories: of the layers' outputs, which blocks that need all sources of a node outside read.
        batch: the mini-batch.
        outward: its edges to the nodes outside.
        inputs: what the network was called with, by name.
        shared: what all layers have in common.
        ways: others are added.
    """

    def __init__(
        self,
        model: BlockwiseGNN,
        gradients: GradientHistories,
        histories: list[History],
        batch: Batch,
        outward: Outward,
        inputs: dict[str, Any],
        shared: Any,
        ways: BlockWays,
    ) -> None:
        self._model = model
        self._gradients = gradients
        self._outside = Outside(gradients, histories, outward, batch.size, trains=True, reads=outward.complete)
        self._batch = batch
        self._outward = outward
        self._edges = Edges(outward)
        self._ways = ways
        self._inputs = inputs_of(inputs, self._edges.by_target if outward.edges.keys() & inputs.keys() else outward)
        self._shared = shared
        self._view = OneBlock(model, shared is not None)
        self._done: set[int] = set()
        self._last: tuple[int, Tensor] | None = None  # rows of other nodes, of one history at a time
        self._factors: list[Tensor] | None = None  # by group, what blocks multiply these rows by

    def observe(self, like: Tensor) -> None:
        """Find how gradients are sent back through all blocks, as far as that is not known.

        Args:
            like: what the stream's rows of the mini-batch look like [B, hidden_channels].

        Raises:
            NotImplementedError: a block is no sum over edges, and there are not all edges that it needs.
        """
        groups, known = self._model.num_groups, self._ways.of_blocks
        if self._outward.num_targets:
            for layer in range(1, self._model.num_layers * groups):
                if (layer, self._outward.complete) not in known:
                    self._observe(layer, like.detach().chunk(groups, 1)[0])
            # What is drawn for it is drawn in the forward pass.
            if self._shared is not None and any(way.form == Form.ANY for way in known.values()):
                self._factors = factors_outside(self._model, self._shared, self._batch, self._outward)

    def of(self, index: int) -> LayerCompensation:
        """Return what goes along with the blocks of a layer."""
        return LayerCompensation(self, index * self._model.num_groups)

    def outside(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what comes through the nodes outside to a block's input [B, channels], and by what factor it counts.

        Args:
            layer: the block's number.
            z: its input [B, channels].
        """
        way = self._ways.of_blocks[layer, self._outward.complete]
        known = self._outside.gradients(layer)
        if known is None:
            return None
        given, trust = known
        own = self._masked(layer, z)
        with self._plain(layer)():
            if way.form == Form.ALL_EDGES:
                found = _through_all(self._view, layer, own, given, None, *self._merged)
            elif way.form == Form.ANY:
                others = self._others(layer, z)
                found = _through_all(self._view, layer, own, given, others, self._edges.adj_t, self._inputs)
            else:
                found = transposed(self._view, layer, way, own, given, self._edges, self._blank)
        return None if found is None else (found[:, : z.size(1)], trust)

    def push(self, layer: int, grad: Tensor) -> None:
        """Write the gradient of a block's output [B, channels].

        Raises:
            RuntimeError: that was done before.
        """
        if layer in self._done:
            raise RuntimeError(BACKWARD_TWICE)
        self._done.add(layer)
        self._gradients.push(layer, grad, self._batch.n_id[: self._batch.size], self._batch.rows)

    def applies(self, layer: int, z: Tensor) -> bool:
        """Return whether a block's input has a gradient, and nodes outside that it may come through."""
        return bool(layer and self._outward.num_targets and torch.is_grad_enabled() and z.requires_grad)

    def _blank(self, targets: int) -> State:
        return self._inputs

    @cached_property
    def _merged(self) -> tuple[Tensor, State]:
        """All edges into the nodes outside, and inputs, with one node in the place of all that are further away."""
        outward, known = self._outward, self._outward.num_targets + self._batch.size
        if outward.n_id.numel() <= known + 1:
            return self._edges.adj_t, self._inputs
        size = outward.num_targets, known + 1
        adj_t = sparse_csr(outward.rowptr, outward.col.clamp(max=known), outward.value, size)
        of_nodes = outward.nodes.keys() & self._inputs.keys()
        return adj_t, self._inputs | {name: self._inputs[name][: known + 1] for name in of_nodes}

    def _plain(self, layer: int) -> Plain:
        return Plain(self._model.block_of(*divmod(layer, self._model.num_groups)))

    def _masked(self, layer: int, z: Tensor) -> Tensor:
        """Return rows of the mini-batch with the factors that the block multiplies its input by behind them."""
        if self._shared is None:
            return z
        mask = self._model.mask_of(self._shared, layer % self._model.num_groups)
        return torch.cat([z, mask[: z.size(0)].to(z)], 1)

    def _others(self, layer: int, z: Tensor) -> Tensor:
        """Return the input of a block at the nodes but the batch's, targets first [T + S, channels]."""
        index, group = divmod(layer, self._model.num_groups)
        table = index if group else index - 1
        if self._last is None or self._last[0] != table:
            self._last = None  # not the rows of two histories at a time
            self._last = table, self._outside.embeddings(table).to(z)
        groups = self._last[1].chunk(self._model.num_groups, 1)
        if layer == 1:
            self._last = None
        rows = groups[group - 1] if group else first_input(groups)
        return rows if self._factors is None else torch.cat([rows, self._factors[group].to(rows)], 1)

    def _observe(self, layer: int, like: Tensor) -> None:
        """Find how a block's gradient is sent back, with drawn numbers, unless one of its kind is known."""
        complete = self._outward.complete
        index, group = divmod(layer, self._model.num_groups)
        kind = kind_of(self._model.block_of(index, group)), complete
        if kind not in self._ways.of_kinds:
            like = self._masked(layer, like)
            with self._plain(layer)():
                self._ways.of_kinds[kind] = self._by_all_edges(layer, like) if complete else self._by_edges(layer, like)
        way = self._ways.of_kinds[kind]
        if way.form == Form.ANY and not complete:
            raise NotImplementedError(
                f"block {group} of layer {index} of {type(self._model).__name__} is none of {_SUMS}: what a source "
                "does to a target depends on the target's other sources. Choose a convolution that sums (graphconv, "
                "sage with aggr='sum', gcn without normalisation of its own), or give the loader "
                'outward="complete", which brings all edges of the nodes outside'
            )
        self._ways.of_blocks[layer, complete] = way

    def _by_edges(self, layer: int, like: Tensor) -> Way:
        outward = self._outward
        if WEIGHTS in self._model.conv_inputs:
            outward = outward._replace(value=other_weights(layer, outward.value))
        return way_of(self._view, layer, like, Edges(outward), self._inputs, self._blank)

    def _by_all_edges(self, layer: int, like: Tensor) -> Way:
        """See whether rows of other nodes matter, where each node outside has an edge from one node more."""
        outward, nodes = self._outward, self._outward.n_id.numel()
        generator = torch.Generator().manual_seed(layer)

        def drawn(tensor: Tensor) -> Tensor:
            return drawn_like(tensor, generator)

        moved, own, targets = Moved(self._view, generator), drawn(like), outward.num_targets
        others = drawn(own.new_zeros(nodes + 1 - own.size(0), own.size(1)))
        given = drawn(own.new_zeros(targets, own.size(1) // (1 + self._view.masked)))
        adj_t, with_more = one_more_edge(outward, outward.col.new_full((targets,), nodes), nodes + 1, drawn)
        inputs = dict(self._inputs)
        inputs |= {name: with_more(inputs[name]) for name in outward.edges.keys() & inputs.keys()}
        for name in outward.nodes.keys() & inputs.keys():
            inputs[name] = torch.cat([inputs[name], drawn(inputs[name][:1])])
        found = [_through_all(moved, layer, own, given, each, adj_t, inputs) for each in (None, others)]
        alike = same(*found)
        if alike:  # and is it so where many of the other sources are one?
            edges = (self._edges.adj_t, self._inputs), self._merged
            alike = same(*(_through_all(moved, layer, own, given, None, *each) for each in edges))
        return Way(Form.ALL_EDGES if alike else Form.ANY)


def _through_all(
    model: LayeredGNN | Moved,
    layer: int,
    own: Tensor,
    given: Tensor,
    others: Tensor | None,
    adj_t: Tensor,
    inputs: State,
) -> Tensor | None:
    """Return what comes back by all edges of the nodes outside [B, channels].

    Args:
        model: gives the block.
        layer: its number.
        own: its input at the batch's nodes, with factors behind [B, channels].
        given: W of the nodes outside [T, channels].
        others: its input at all other nodes [T + S, channels]; ``None``: it does not matter.
        adj_t: the edges [T, T + B + S].
        inputs: what the block takes of them.
    """
    targets = given.size(0)
    if others is None:
        others = own.new_zeros(adj_t.size(1) - own.size(0), own.size(1))
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        x = torch.cat([others[:targets], own, others[targets:]])
        out = model.run_layer(layer, x, adj_t, inputs)
        return torch.autograd.grad(out, own, given.to(out), allow_unused=True)[0] if out.requires_grad else None


@dataclass(frozen=True)
class LayerCompensation:
    """What goes along with the blocks of one layer.

    Attributes:
        of: the mini-batch's pass.
        first: the number of the layer's first block.
    """

    of: BlockCompensation
    first: int

    def enter(self, group: int, z: Tensor) -> Tensor:
        """Return a block's input [B, channels], whose gradient will be completed."""
        layer = self.first + group
        if not self.of.applies(layer, z):
            return z
        joined: Tensor = _Enter.apply(z, self.of, layer, autocast_now())  # type: ignore[no-untyped-call]
        return joined

    def leave(self, group: int, out: Tensor) -> Tensor:
        """Return a block's output [B, channels], whose gradient will be written into its history."""
        layer = self.first + group
        if not (layer and torch.is_grad_enabled() and out.requires_grad):
            return out
        joined: Tensor = _Leave.apply(out, self.of, layer)  # type: ignore[no-untyped-call]
        return joined


class _Enter(torch.autograd.Function):
    """The identity, whose gradient is completed by what comes through the nodes outside."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, of: BlockCompensation, layer: int, autocast: Autocast) -> Tensor:
        ctx.of, ctx.layer, ctx.autocast = of, layer, autocast
        ctx.save_for_backward(z)
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        with autocast_as(ctx.autocast):
            found = ctx.of.outside(ctx.layer, z)
        if found is not None:
            rows, trust = found
            grad = torch.addcmul(grad, rows.to(grad), trust.to(grad))
        return grad, None, None, None


class _Leave(torch.autograd.Function):
    """The identity, whose gradient is written into a history."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, of: BlockCompensation, layer: int) -> Tensor:
        ctx.of, ctx.layer = of, layer
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.of.push(ctx.layer, grad)
        return grad, None, None
