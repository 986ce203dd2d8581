"""Networks whose layers read what is outside of a mini-batch from histories."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect._parameters import reset_parameters
from recollect.autoscale._adjacency import as_csr, first_rows
from recollect.autoscale._batch import Batch
from recollect.autoscale._corrected import CorrectedGNN
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._inference import LayerWise, evaluating
from recollect.autoscale._making import as_channels, forget, fresh_histories, make_histories, make_pool, widths_of
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._sub_data import SubData

__all__ = ["ScalableGNN"]


class ScalableGNN(CorrectedGNN):
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
        pool_size: buffers of an :class:`~recollect.autoscale.AsyncIOPool`, which moves rows beside the computation:
            the pulls of all layers start before the first one is computed. Results are the same, bit for bit.
            ``None``: rows are moved when they are needed.
        buffer_size: rows of each buffer, at least those of the largest halo; comes with ``pool_size``. For layer-wise
            inference to use the pool too, at least those of the largest mini-batch and its halo.
        device: of the histories; ``None``: host memory.
        history_dtype: in which histories are kept.
        history_path: a folder; histories are then files in it, ``0.history`` and so on.
        save_histories: whether ``state_dict`` holds the histories, see :class:`~recollect.autoscale.History`.
        keep_histories: ``False``: the network is for the whole graph, and histories take no memory. Mini-batches are
            refused then; layer-wise inference fills histories that it makes for itself.
        recompute: run every layer in a frame: kept for backward is the batch's part of its input alone. In backward
            the layer is run again and its halo rows are pulled again.
        compensate: give a mini-batch's nodes the gradients that they have through nodes outside, from histories of
            gradients ("LMC", arXiv 2302.00924). Needs mini-batches with ``data.outward``, given as ``outward=``, and
            layers that are sums over edges, unless all edges are there; see docs/graph.md.

    Attributes:
        gradients: with ``compensate``, the histories of gradients.
        inputs: names of what the layers need of a mini-batch's data beside ``x`` and ``adj_t``, such as ``edge_attr``.

    Raises:
        ValueError: a number is out of its range, ``history_path`` is a file, or ``compensate`` goes without histories
            or with a ``forward`` of the network's own.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from recollect.autoscale import ScalableGNN, SubgraphLoader, partition, permute, propagate, to_adj_t
        >>> class Sum(ScalableGNN):
        ...     def __init__(self, num_nodes, channels, num_layers):
        ...         super().__init__(num_nodes, channels, num_layers)
        ...         self.lins = torch.nn.ModuleList(torch.nn.Linear(channels, channels) for _ in range(num_layers))
        ...
        ...     def forward_layer(self, layer, x, adj_t, state):
        ...         return self.lins[layer](x[: adj_t.size(0)] + propagate(adj_t, x)).relu()
        >>> ring = torch.arange(8)
        >>> data = to_adj_t(Data(x=torch.randn(8, 4), edge_index=torch.stack([ring, ring.roll(1)])))
        >>> perm, ptr, *_ = partition(data.adj_t, num_parts=2, method="contiguous", log=False)
        >>> data = permute(data, perm, log=False)
        >>> model = Sum(num_nodes=8, channels=4, num_layers=3)
        >>> for batch in SubgraphLoader(data, ptr, log=False):  # a step of training: optimizer and loss as ever
        ...     out = model(batch.data.x, batch.data.adj_t, *batch[1:])
        ...     out.sum().backward()
        >>> out.shape
        torch.Size([4, 4])
        >>> model(loader=SubgraphLoader(data, ptr, log=False)).shape  # all nodes, exactly, in mini-batches
        torch.Size([8, 4])
    """

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
        keep_histories: bool = True,
        recompute: bool = False,
        compensate: bool = False,
    ) -> None:
        super().__init__(num_layers, recompute)
        if compensate and (not keep_histories or type(self).forward is not ScalableGNN.forward):
            found = "a forward of its own" if keep_histories else "keep_histories=False"
            raise ValueError(
                f"{type(self).__name__} has {found}, but compensate=True needs histories and layers that are written "
                "in forward_layer alone"
            )
        if not keep_histories and (pool_size or history_path or save_histories):
            raise ValueError("keep_histories=False goes without pool_size, history_path and save_histories")
        self.num_nodes = as_count("num_nodes", num_nodes, ", such as data.num_nodes")
        self.hidden_channels = as_channels(hidden_channels)
        widths = widths_of(self.hidden_channels, self.num_layers)
        self.pool = make_pool(pool_size, buffer_size, widths)
        self.keep_histories = keep_histories
        self.histories = make_histories(
            self.num_nodes, widths, device, history_dtype, history_path, save_histories, keep_histories
        )
        self.keep_gradients(compensate, self.num_nodes, widths, device, history_dtype, history_path)
        self._exchange = Exchange(self.pool)
        self._device = torch.device("cpu" if device is None else device)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, and empty the histories."""
        for child in self.children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                reset_parameters(module)

    def __call__(
        self,
        x: Tensor | None = None,
        adj_t: Any = None,
        batch_size: int | None = None,
        n_id: Tensor | None = None,
        offset: Tensor | None = None,
        count: Tensor | None = None,
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

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: something beside a loader; see :meth:`forward` too.
        """
        if loader is not None:
            if x is not None or adj_t is not None or batch_size is not None or inputs:
                raise ValueError("a loader brings all that is evaluated: give nothing else beside it")
            return self.mini_inference(loader)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor (got {type(x).__name__}): call model(data.x, data.adj_t) for the whole graph, "
                "model(batch.data.x, batch.data.adj_t, *batch[1:]) for a mini-batch, or model(loader=loader)"
            )
        batch = Batch.of(batch_size, n_id, offset, count)
        try:
            if batch is not None:
                self._exchange.start(self.tables, batch.halo)
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
            **inputs: what the layers find in their state, such as ``edge_attr``; ``edge_weight`` of an ``EdgeIndex``;
                ``outward``, a mini-batch's ``data.outward``, with ``compensate=True``.

        Returns:
            [num_nodes, out_channels], or [B, out_channels].

        Raises:
            TypeError: ``adj_t`` is neither, or a layer returns no tensor.
            ValueError: sizes disagree, or the batch is not one of this graph, permuted. Nothing was written then.
            IndexError: a node that the histories do not have.
            NotImplementedError: ``compensate=True`` does not hold for a layer; the message says what to do.
        """
        adj_t = as_csr(adj_t, inputs.pop("edge_weight", None))
        outward = inputs.pop("outward", None)
        batch = Batch.of(batch_size, n_id, offset, count)
        if batch is None:
            if not x.size(0) == adj_t.size(0) == adj_t.size(1):
                raise ValueError(
                    f"adj_t is {list(adj_t.shape)} and x has {x.size(0)} rows, but the whole graph has as many rows, "
                    "columns and nodes; call model(batch.data.x, batch.data.adj_t, *batch[1:]) for a mini-batch"
                )
            return self.run_layers(x, adj_t, inputs, _unchanged if self.training else self._fill)
        batch.check_inputs(x, adj_t)
        return self.run_layers(
            x,
            first_rows(adj_t, batch.size),
            inputs,
            lambda layer, rows: self.push_and_pull(self.tables[layer], rows, *batch.arguments),
            lambda layer, rows: self._exchange.source_of(self.tables[layer], rows, batch),
            self.correction(batch, outward, inputs),
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
            if x.size(0) == history.num_embeddings:
                history.push(x.detach())
            return x
        return self._exchange.swap(history, x, batch)

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
        with evaluating(self):
            if self.keep_histories:
                return LayerWise(self, self.num_nodes, loader, self.tables, self._exchange).run(self._device)
            fresh = fresh_histories(self.tables, self.parameters())
            return LayerWise(self, self.num_nodes, loader, fresh, Exchange()).run(self._device, partial(forget, fresh))

    def staleness(self) -> list[float]:
        """Return the mean age of each history's rows: how often the history was pushed to since a row was.

        Rows that were never pushed, which are 0, count as old as the history; :meth:`never_pushed` tells how many there
        are. A history that was never pushed to at all has no age: it is infinite. See
        :func:`~recollect.autoscale.history_errors` for how wrong the rows are.

        Raises:
            RuntimeError: the network was made with ``keep_histories=False``.
        """
        ages = [float(history.age().to(torch.float64).mean()) for history in self.tables]
        return [age if history.table.clock.pushes else math.inf for age, history in zip(ages, self.tables, strict=True)]

    def never_pushed(self) -> list[int]:
        """Return how many rows of each history are still 0: their nodes were in no mini-batch, and nothing filled them.

        ``model(loader=loader)`` fills them all.

        Raises:
            RuntimeError: the network was made with ``keep_histories=False``.
        """
        return [history.never_pushed() for history in self.tables]

    @property
    def tables(self) -> list[History]:
        """The histories, as what they are."""
        return [history for history in self.histories if isinstance(history, History)]

    def _fill(self, layer: int, rows: Tensor) -> Tensor:
        return self.push_and_pull(self.tables[layer], rows)


def _unchanged(layer: int, rows: Tensor) -> Tensor:
    return rows
