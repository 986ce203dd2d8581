"""Histories of gradients made exact, layer by layer from the last one, one mini-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect._util._tree import Tree, tensors_of
from recollect.autoscale._adjacency import adjacency_of, first_rows
from recollect.autoscale._conditions import Plain
from recollect.autoscale._network import LayeredGNN, State
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._sub_data import SubData

__all__ = ["GradientSweep", "Loss"]

Loss = Callable[[Tensor, SubData], Tensor]
"""From a mini-batch's output [B, out_channels] and the mini-batch to its loss, a scalar."""


class GradientSweep:
    """One pass from the last layer to the second: each layer for all mini-batches, before the one below begins.

    A mini-batch sends its targets' gradients to all their sources, so rows are complete when every mini-batch has done
    so; the nodes outside need no edges of their own. Held in memory are a gradient for each node and channel of two
    layers (and of those whose outputs stay in the state), and what the layers leave in their state, for all nodes.

    Over ranks each has the rows of its own nodes, and takes as many mini-batches as every other: what a mini-batch adds
    to the gradients of its halo goes to the ranks that own it.

    Args:
        model: gives the layers.
        num_nodes: N; over ranks, those of this one.
        loader: yields every node once in each of its passes, in the same mini-batches.
        histories: of the layers' outputs, exact.
        gradients: are written.
        loss: of a mini-batch.
    """

    def __init__(
        self,
        model: LayeredGNN,
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
        self._shares = histories[0].shares if histories else None
        self._first = 0 if self._shares is None else self._shares.nodes[0]
        self._parameter = next(iter(model.parameters()), torch.empty(0))
        self._found: dict[int, Tensor] = {}  # by layer, the loss' gradient by its output [N, channels]
        self._states: list[list[State]] = []  # by mini-batch and layer, what it begins with
        self._left: list[dict[int, int]] = []  # by mini-batch, the layers whose outputs stay, by the tensors' ids

    def run(self) -> None:
        """Run all layers."""
        last = self._model.num_layers - 1
        with Plain(self._model)():
            for layer in range(last, 0, -1):
                if layer in (last, *range(2, last)):  # what goes into the second layer's input nobody asks for
                    for number, sub in enumerate(self._loader):
                        self._send_back(layer, number, sub)
                found = self._found.pop(layer, None)
                if found is not None:
                    history = self._gradients.table(layer, found.size(1))
                    history.write(found, history.table.everything)
        self._gradients.believe()

    def _send_back(self, layer: int, number: int, sub: SubData) -> None:
        """Add what one mini-batch's targets in a layer send to the layers below."""
        adj_t = first_rows(sent(adjacency_of(sub.data), self._parameter.device), sub.batch_size)
        last = layer == self._model.num_layers - 1
        n_id = sub.n_id.to("cpu", torch.int64)  # which ranks have which of them is then found out once
        if last:
            self._states.append(self._states_of(sub, n_id, adj_t))
        before = self._states[number][layer]
        tree = Tree(before)
        left = [(k, self._left[number].get(id(tensor))) for k, tensor in enumerate(tree.tensors)]
        x = self._input(layer, sub, n_id).requires_grad_()
        with torch.enable_grad():
            tensors = list(tree.tensors)
            outputs = {}
            for k, earlier in left:
                if earlier is not None:
                    tensors[k] = outputs[earlier] = tensors[k].detach().requires_grad_()
            state: State = tree.build(tensors)
            out = self._model.run_layer(layer, x, adj_t, state)
            own = n_id[: sub.batch_size] - self._first
            if last:
                value = self._loss(self._model.readout(out, state), sub)
            else:
                value = (out * self._found[layer][sent(own, self._found[layer].device)].to(out)).sum()
            asked = [x, *outputs.values(), *([out] if last else [])]
            grads = torch.autograd.grad(value, asked, allow_unused=True)
        if layer > 1:
            self._add_around(layer - 1, n_id, x, grads[0])
        for earlier, grad in zip(outputs, grads[1:], strict=False):
            self._add(earlier, own, outputs[earlier], grad)
        if last:
            self._add(layer, own, out, grads[-1])

    def _states_of(self, sub: SubData, n_id: Tensor, adj_t: Tensor) -> list[State]:
        """Return what each layer begins with, by running those before it."""
        state: State = {name: sub.data[name] for name in self._model.inputs}
        states, left = [], {}
        with torch.no_grad():
            for layer in range(self._model.num_layers - 1):
                states.append(state)
                state = dict(state)
                out = self._model.run_layer(layer, self._input(layer, sub, n_id), adj_t, state)
                if layer and any(tensor is out for tensor in tensors_of(state)):
                    left[id(out)] = layer
        self._left.append(left)
        return [*states, state]

    def _input(self, layer: int, sub: SubData, n_id: Tensor) -> Tensor:
        if layer == 0:
            features: Tensor = sent(sub.data.x, self._parameter.device)
            return features
        return self._histories[layer - 1].begin_pull(n_id, "rows of a mini-batch")().to(self._parameter)

    def _add_around(self, layer: int, n_id: Tensor, rows: Tensor, grad: Tensor | None) -> None:
        """Add the gradients of a mini-batch's rows, and of its halo's, where the nodes are."""
        if self._shares is None:
            self._add(layer, n_id, rows, grad)
            return
        values = torch.zeros_like(rows) if grad is None else grad
        found = self._shares.route(n_id).give_back(values.detach(), "gradients of a mini-batch's halo")
        for places, values in found:
            self._add(layer, places, rows, values)

    def _add(self, layer: int, own: Tensor, rows: Tensor, grad: Tensor | None) -> None:
        if layer not in self._found:
            self._found[layer] = rows.new_zeros(self._num_nodes, rows.size(1), requires_grad=False)
        if grad is not None:
            self._found[layer].index_add_(0, sent(own, rows.device), grad)
