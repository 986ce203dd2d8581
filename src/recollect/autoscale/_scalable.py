"""Networks whose layers read what is outside of a mini-batch from histories."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._parameters import reset_parameters
from recollect.autoscale._batch import Batch
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._history import History, history_bytes
from recollect.autoscale._inference import LayerWise, evaluating
from recollect.autoscale._operators import as_csr, first_rows
from recollect.autoscale._sub_data import SubData
from recollect.frames import checkpoint, in_backward

__all__ = ["ScalableGNN"]

_logger = logging.getLogger(__name__)
Between = Callable[[int, Tensor], Tensor]


class ScalableGNN(nn.Module):
    """A network that trains on mini-batches of a graph's parts, with histories for their halo.

    Write each layer once, in :meth:`forward_layer`. From it derive:

    - ``model(x, adj_t)``: the whole graph.
    - ``model(x, adj_t, batch_size, n_id, offset, count)``: a mini-batch as a SubgraphLoader yields it. After each layer
      but the last the batch's embeddings are pushed to the layer's history, and those of the halo are pulled from it,
      as constants ("GNNAutoScale", arXiv 2106.05609, equation 2 and algorithm 1).
    - ``model(loader=loader)``: layer-wise inference over the whole graph, see :meth:`mini_inference`.

    A network that needs another order of things overrides :meth:`forward` and calls :meth:`push_and_pull` itself.

    A layer's ``state`` is a dict that lives as long as one pass over the layers. It begins with the keyword arguments
    of the call (those that :attr:`inputs` names, when a loader is called), and a layer may leave tensors in it for the
    layers after it: assign new ones, and do not change what is there in place.

    Args:
        num_nodes: of the whole graph, N.
        hidden_channels: width of every layer's output but the last, or one number for each.
        num_layers: L, at least 1; there are L - 1 histories.
        pool_size: mini-batches' rows that an :class:`~recollect.autoscale.AsyncIOPool` holds; with it and
            ``buffer_size`` rows are moved beside the computation. ``None``: they are moved when they are needed.
        buffer_size: rows of each of the pool's buffers: at least the largest halo.
        device: of the histories; ``None``: host memory.
        history_dtype: in which histories are kept.
        history_path: a folder; histories are then files in it, ``0.history`` and so on.
        save_histories: whether ``state_dict`` holds the histories, see :class:`~recollect.autoscale.History`.
        recompute: run every layer in a frame: kept for backward is the batch's part of its input alone. In backward
            the layer is run again and its halo rows are pulled again.

    Attributes:
        inputs: names of what the layers need of a mini-batch's data beside ``x`` and ``adj_t``, such as ``edge_attr``.

    Raises:
        ValueError: a number is out of its range.
    """

    inputs: tuple[str, ...] = ()

    def __init__(
        self,
        num_nodes: int,
        hidden_channels: int | Sequence[int],
        num_layers: int,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        *,
        history_dtype: torch.dtype = torch.float32,
        history_path: str | Path | None = None,
        save_histories: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(num_nodes, hidden_channels, num_layers)
        self.num_nodes = num_nodes
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.recompute = recompute
        size = sum(history_bytes(num_nodes, width, history_dtype) for width in widths)
        place = device if history_path is None else history_path
        _logger.info("%d histories take %.3f GiB in %s", len(widths), size / 2**30, place or "host memory")
        self.histories = nn.ModuleList(
            History(num_nodes, width, device, history_dtype, _file(history_path, layer), save_histories=save_histories)
            for layer, width in enumerate(widths)
        )
        self._device = torch.device("cpu" if device is None else device)
        self._exchange = Exchange()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, and empty the histories."""
        for child in self.children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                reset_parameters(module)

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the layer's output for the targets of the adjacency. To be written by each network.

        Args:
            layer: its number, from 0 to ``num_layers - 1``.
            x: its input for all sources [num_sources, in_channels]; the targets come first among them.
            adj_t: sparse CSR adjacency [num_targets, num_sources]; of the whole graph, both are all its nodes.
            state: see the class.

        Returns:
            [num_targets, out_channels].
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no forward_layer(layer, x, adj_t, state): training on mini-batches and "
            "layer-wise inference both derive from it"
        )

    def __call__(
        self,
        x: Tensor | None = None,
        adj_t: Any = None,
        batch_size: int | None = None,
        n_id: Tensor | None = None,
        offset: Tensor | None = None,
        count: Tensor | None = None,
        *,
        loader: Iterable[SubData] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Evaluate the whole graph, a mini-batch, or layer by layer what a loader yields; see :meth:`forward`.

        Args:
            x: see :meth:`forward`.
            adj_t: see :meth:`forward`.
            batch_size: see :meth:`forward`.
            n_id: see :meth:`forward`.
            offset: see :meth:`forward`.
            count: see :meth:`forward`.
            loader: evaluate layer by layer what it yields, see :meth:`mini_inference`; nothing else is given then.
            **inputs: see :meth:`forward`.
        """
        if loader is not None:
            return self.mini_inference(loader)
        batch = Batch.of(batch_size, n_id, offset, count)
        if batch is not None:
            self._exchange.start(self._tables, batch.halo)
        try:
            out: Tensor = super().__call__(x, adj_t, batch_size, n_id, offset, count, **inputs)
            return out
        finally:
            self._exchange.finish()

    def forward(
        self,
        x: Tensor,
        adj_t: Any,
        batch_size: int | None = None,
        n_id: Tensor | None = None,
        offset: Tensor | None = None,
        count: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Evaluate the whole graph, or a mini-batch.

        The whole graph in evaluation mode also fills the histories, which are then exact. In training mode it leaves
        them alone.

        Args:
            x: features of all nodes, or of the mini-batch's and its halo's [len(n_id), in_channels].
            adj_t: sparse CSR adjacency or ``EdgeIndex``. Of a mini-batch, [batch_size, len(n_id)], or square with
                empty rows for the halo.
            batch_size: number of nodes in the mini-batch, B.
            n_id: the mini-batch's nodes and their halo [B + halo], int64.
            offset: first node of each of its parts [parts], int64.
            count: number of nodes of each part [parts], int64.
            **inputs: what the layers find in their state, such as ``edge_attr``; ``edge_weight`` of an ``EdgeIndex``.

        Returns:
            [num_nodes, out_channels], or [B, out_channels].

        Raises:
            ValueError: sizes disagree, or the batch is not one of this graph, permuted. Nothing was written then.
            IndexError: a node that the histories do not have.
        """
        adj_t = as_csr(adj_t, inputs.pop("edge_weight", None))
        batch = Batch.of(batch_size, n_id, offset, count)
        if batch is None:
            return self._run(x, adj_t, inputs, self._between_full(x))
        batch.check_inputs(x, adj_t)
        return self._run(
            x,
            first_rows(adj_t, batch.size),
            inputs,
            lambda layer, rows: self.push_and_pull(self._tables[layer], rows, *batch.arguments),
        )

    def push_and_pull(
        self,
        history: History,
        x: Tensor,
        batch_size: int | None = None,
        n_id: Tensor | None = None,
        offset: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Push a mini-batch's embeddings to a history, and pull those of its halo from it.

        In a rebuild nothing is pushed, and what was pulled is pulled again.

        Args:
            history: of the layer whose output ``x`` is.
            x: [at least B, channels]; the first B rows count.
            batch_size: see :meth:`forward`.
            n_id: see :meth:`forward`.
            offset: see :meth:`forward`.
            count: see :meth:`forward`.

        Returns:
            [len(n_id), channels]: the first B rows of ``x``, then the halo's, which have no gradient. Without a
            mini-batch ``x`` itself; it is pushed if it has a row for each node of the history.

        Raises:
            ValueError: sizes disagree, or the history is of another size than the graph.
            IndexError: a node that the history does not have.
        """
        batch = Batch.of(batch_size, n_id, offset, count)
        if batch is None:
            if x.size(0) == history.num_embeddings and not in_backward():
                history.push(x.detach())
            return x
        return self._exchange(history, x, batch)

    def mini_inference(self, loader: Iterable[SubData]) -> Tensor:
        """Evaluate the whole graph layer by layer, in mini-batches, and fill the histories on the way.

        Every layer is evaluated for all mini-batches before the next one begins, so the result is that of the whole
        graph, to the precision of the histories. It is always computed in evaluation mode and without gradients; the
        modes of the modules are as before afterwards. Memory: one mini-batch, the result, and what the layers leave in
        their state, for all nodes.

        Args:
            loader: yields every node once, in the same mini-batches each time: an EvalSubgraphLoader.

        Returns:
            [num_nodes, out_channels], on the histories' device.

        Raises:
            ValueError: the loader leaves out nodes, or changes its mini-batches.
        """
        self.synchronize()
        with evaluating(self):
            return LayerWise(self, loader, self._tables).run(self._device)

    def synchronize(self) -> None:
        """Wait until all that was pushed stands in the histories."""
        self._exchange.synchronize()

    def evaluate(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        """Return a layer's output, for the adjacency's targets alone; see :meth:`forward_layer`."""
        out = self.forward_layer(layer, x, adj_t, state)
        if out.size(0) < adj_t.size(0):
            raise ValueError(
                f"{type(self).__name__}.forward_layer({layer}, ...) returned {out.size(0)} rows, but its adjacency "
                f"has {adj_t.size(0)} targets: one for each is expected"
            )
        return out[: adj_t.size(0)]

    def conclude(self, state: dict[str, Any]) -> None:
        """Take notice of what the layers left in their state, at the end of a pass over the whole graph or a batch.

        Args:
            state: see the class.
        """

    @property
    def _tables(self) -> list[History]:
        """The histories, as what they are."""
        return [history for history in self.histories if isinstance(history, History)]

    def _run(self, x: Tensor, adj_t: Tensor, inputs: dict[str, Any], between: Between) -> Tensor:
        """Evaluate all layers; ``between`` is applied to each output but the last."""
        state = dict(inputs)
        for layer in range(self.num_layers):
            if self.recompute:
                x, state = checkpoint(self._stage(layer, adj_t, state, between), x)
            else:
                x, state = self._stage(layer, adj_t, state, between)(x)
        self.conclude(state)
        return x

    def _stage(
        self, layer: int, adj_t: Tensor, state: dict[str, Any], between: Between
    ) -> Callable[[Tensor], tuple[Tensor, dict[str, Any]]]:
        """Return a layer as a function of the output before it, which leaves ``state`` as it is."""

        def stage(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            after = dict(state)
            if layer:
                x = between(layer - 1, x)
            return self.evaluate(layer, x, adj_t, after), after

        return stage

    def _between_full(self, x: Tensor) -> Between:
        if self.training or x.size(0) != self.num_nodes:
            return lambda layer, rows: rows
        return lambda layer, rows: self.push_and_pull(self._tables[layer], rows)


def _widths(num_nodes: int, hidden_channels: int | Sequence[int], num_layers: int) -> list[int]:
    for name, value in (("num_nodes", num_nodes), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1 (got {value})")
    if isinstance(hidden_channels, int):
        return [hidden_channels] * (num_layers - 1)
    if len(hidden_channels) != num_layers - 1:
        raise ValueError(
            f"hidden_channels has {len(hidden_channels)} numbers, but between {num_layers} layers there are "
            f"{num_layers - 1} outputs: one number for each is expected"
        )
    return list(hidden_channels)


def _file(folder: str | Path | None, layer: int) -> Path | None:
    return None if folder is None else Path(folder) / f"{layer}.history"
