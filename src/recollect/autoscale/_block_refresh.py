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

    Over ranks each has the rows of its own nodes, and takes as many mini-batches as every other: what a mini-batch adds
    to the gradients of its halo goes to the ranks that own it.

    Args:
        model: gives the blocks.
        num_nodes: N; over ranks, those of this one.
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
        self._shares = histories[0].shares
        self._first = 0 if self._shares is None else self._shares.nodes[0]
        self._view = OneBlock(model)
        self._parameter = next(iter(model.parameters()), torch.empty(0))

    def run(self) -> None:
        """Run all blocks."""
        groups = self._model.num_groups
        with Plain(self._model)():
            stream = self._of_output().chunk(groups, 1)
            for layer in range(self._model.num_layers * groups - 1, 0, -1):
                own = stream[layer % groups].contiguous()
                history = self._gradients.table(layer, own.size(1))
                history.write(own, history.table.everything)
                if layer > 1:  # what goes into the second block's input nobody asks for
                    into = [layer % groups - 1] if layer % groups else range(1, groups)
                    self._send_back(layer, own, [stream[group] for group in into])
        self._gradients.believe()

    def _of_output(self) -> Tensor:
        """Return the loss' gradient by the last layer's output [N, hidden_channels]."""
        found = None
        for sub in self._loader:
            own = sub.n_id[: sub.batch_size].to("cpu", torch.int64)
            rows = self._histories[-1].pull_own(own).to(self._parameter).requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(self._loss(self._model.classify(rows), sub), rows, allow_unused=True)
            if found is None:
                found = rows.new_zeros(self._num_nodes, rows.size(1), requires_grad=False)
            if grad is not None:
                found[(own - self._first).to(found.device)] = grad
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
            n_id = sub.n_id.to("cpu", torch.int64)  # which ranks have which of them is then found out once
            rows = history.begin_pull(n_id, "rows of a mini-batch")().to(self._parameter)
            groups = rows.chunk(self._model.num_groups, 1)
            z = (groups[group - 1] if group else first_input(groups)).detach().requires_grad_()
            state = {name: sub.data[name] for name in self._model.inputs}
            with torch.enable_grad():
                out = self._view.run_layer(layer, z, adj_t, state)
                own = given[(n_id[: sub.batch_size] - self._first).to(given.device)].to(out)
                grad = torch.autograd.grad(out, z, own, allow_unused=True)[0] if out.requires_grad else None
            for places, values in self._where_they_are(n_id, z, grad):
                for rows_of_group in into:
                    rows_of_group.index_add_(0, places.to(values.device), values)

    def _where_they_are(self, n_id: Tensor, rows: Tensor, grad: Tensor | None) -> Iterable[tuple[Tensor, Tensor]]:
        """Return numbers of rows of this rank, counted from its first one, and what is added to their gradients."""
        if self._shares is None:
            return [] if grad is None else [(n_id, grad)]
        values = torch.zeros_like(rows) if grad is None else grad  # ranks exchange as often
        return self._shares.route(n_id).give_back(values.detach(), "gradients of a mini-batch's halo")
