"""Histories of gradients made exact, block by block from the last one, one mini-batch after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.autoscale._adjacency import adjacency_of, first_rows
from recollect.autoscale._blocks import OneBlock, first_input
from recollect.autoscale._conditions import Plain
from recollect.autoscale._refresh import Loss
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._sub_data import SubData

if TYPE_CHECKING:
    from recollect.autoscale._blockwise import BlockwiseGNN

__all__ = ["BlockSweep"]


class BlockSweep:
    """One pass from the last block to the second: each for all mini-batches, before the one below begins.

    Held in memory is a gradient for each node and channel of the stream.

    Args:
        model: gives the blocks.
        num_nodes: N.
        loader: yields every node once in each of its passes, in the same mini-batches.
        histories: of the layers' outputs, exact.
        gradients: of the blocks' outputs; are written.
        loss: of a mini-batch.
    """

    def __init__(
        self,
        model: BlockwiseGNN,
        num_nodes: int,
        loader: Iterable[SubData],
        histories: Sequence[History],
        gradients: GradientHistories,
        loss: Loss,
    ) -> None:
        self._model = model
        self._num_nodes = num_nodes
        self._loader = loader
        self._histories = histories
        self._gradients = gradients
        self._loss = loss
        self._view = OneBlock(model)
        self._parameter = next(iter(model.parameters()), torch.empty(0))

    def run(self) -> None:
        """Run all blocks."""
        groups = self._model.num_groups
        with Plain(self._model)():
            stream = self._of_output().chunk(groups, 1)
            for layer in range(self._model.num_layers * groups - 1, 0, -1):
                own = stream[layer % groups].contiguous()
                self._gradients.table(layer, own.size(1)).push(own)
                if layer > 1:  # what goes into the second block's input nobody asks for
                    into = [layer % groups - 1] if layer % groups else range(1, groups)
                    self._send_back(layer, own, [stream[group] for group in into])
        self._gradients.believe()

    def _of_output(self) -> Tensor:
        """Return the loss' gradient by the last layer's output [N, hidden_channels]."""
        found = None
        for sub in self._loader:
            own = sub.n_id[: sub.batch_size]
            rows = self._histories[-1].pull(own).to(self._parameter).requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(self._loss(self._model.classify(rows), sub), rows, allow_unused=True)
            if found is None:
                found = rows.new_zeros(self._num_nodes, rows.size(1), requires_grad=False)
            if grad is not None:
                found[own.to(found.device)] = grad
        if found is None:
            raise ValueError("the loader yields no mini-batch")
        return found

    def _send_back(self, layer: int, given: Tensor, into: list[Tensor]) -> None:
        """Add what a block's outputs send to its inputs to the gradients of what these are sums of.

        Args:
            layer: the block's number.
            given: W of its outputs [N, channels].
            into: [N, channels] each.
        """
        index, group = divmod(layer, self._model.num_groups)
        history = self._histories[index if group else index - 1]
        for sub in self._loader:
            adj_t = first_rows(adjacency_of(sub.data).to(self._parameter.device), sub.batch_size)
            rows = history.pull(sub.n_id).to(self._parameter).chunk(self._model.num_groups, 1)
            z = (rows[group - 1] if group else first_input(rows)).detach().requires_grad_()
            state = {name: sub.data[name] for name in self._model.inputs}
            with torch.enable_grad():
                out = self._view.run_layer(layer, z, adj_t, state)
                if not out.requires_grad:
                    continue
                own = given[sub.n_id[: sub.batch_size].to(given.device)]
                (grad,) = torch.autograd.grad(out, z, own.to(out), allow_unused=True)
            if grad is not None:
                for rows_of_group in into:
                    rows_of_group.index_add_(0, sub.n_id.to(grad.device), grad)
