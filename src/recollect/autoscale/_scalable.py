"""Networks whose layers read what is outside of a mini-batch from histories."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect._parameters import reset_parameters
from recollect.autoscale._adjacency import as_csr, first_rows
from recollect.autoscale._batch import Batch, BatchArguments
from recollect.autoscale._combination import CombinedPass
from recollect.autoscale._corrected import CorrectedGNN
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._inference import LayerWise, States, Tables, check_layerwise, evaluating
from recollect.autoscale._locality import check_locality
from recollect.autoscale._making import fresh_histories
from recollect.autoscale._stamp import BatchSize, GraphStamp, belongs, check_graph, take_graph
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._loader import SubgraphLoader
from recollect.autoscale.loader._sub_data import SubData
from recollect.frames import in_backward
from recollect.messages.reach import Look, look_of

__all__ = ["ScalableGNN", "TrueRows", "unchanged"]

TrueRows = Iterable[tuple[Tensor, Tensor]]
"""Pieces of what a history should hold: nodes [rows] int64, and their embeddings [rows, channels]."""

_ROWS_AT_ONCE = 65_536


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
        pool_size: see :class:`~recollect.autoscale.HistoryOptions`.
        buffer_size: see there; comes with ``pool_size``.
        device: of the histories; ``None``: host memory.
        histories: their other options.
        recompute: run every layer in a frame: kept for backward is the batch's part of its input alone. In backward
            the layer is run again and its halo rows are pulled again; over ranks those of other ranks are kept.
        compensate: give a mini-batch's nodes the gradients that they have through nodes outside, from histories of
            gradients ("LMC", arXiv 2302.00924). Needs mini-batches with ``data.outward``, given as ``outward=``, and
            layers that are sums over edges, unless all edges are there; see docs/graph.md.
        combine: with ``compensate``, a :class:`~recollect.autoscale.Combination`: halo rows are combined from histories
            and from what the mini-batch tells of them, forward and backward. ``None``: they are those of histories.
            Needs mini-batches with ``outward="induced"``, or ``"complete"``.
        **options: ``history_dtype``, ``history_path``, ``save_histories`` and ``keep_histories``: ``dtype``, ``path``,
            ``save`` and ``keep`` of ``histories``, under the names that they have beside a network's other arguments.

    Attributes:
        gradients: with ``compensate``, the histories of gradients.
        histories: a ModuleList of :class:`~recollect.autoscale.History`, one for each layer but the last.
        inputs: names of what the layers need of a mini-batch's data beside ``x`` and ``adj_t``, such as ``edge_attr``.

    Raises:
        ValueError: a number is out of its range, options do not go together, the path of histories is no folder, or
            ``compensate`` goes without histories or with a ``forward`` of the network's own.
        TypeError: there is no such option.

    Warns:
        UserWarning: once, when the first mini-batch is trained on with histories that were not filled.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader
        >>> from recollect.autoscale import partition, permute, propagate, to_adj_t
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
        >>> everything = EvalSubgraphLoader(data, ptr, log=False)
        >>> model(loader=everything).shape  # all nodes, exactly, in mini-batches; fills the histories
        torch.Size([8, 4])
        >>> for batch in SubgraphLoader(data, ptr, log=False):  # a step of training: optimizer and loss as ever
        ...     out = model(batch.data.x, batch.data.adj_t, *batch[1:])
        ...     out.sum().backward()
        >>> out.shape
        torch.Size([4, 4])
    """

    _look: Look | None = None  # of the network's parts when its layers were looked at

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
        if isinstance(batch_size, BatchSize):
            check_graph(self.tables, batch_size.graph)
        batch = self._batch((batch_size, n_id, offset, count))
        try:
            if batch is None:
                self._exchange.whole = self._stamp(adj_t)
            else:
                self.warn_of_unfilled(batch)
                self._exchange.start(self.tables, batch)
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
        batch = self._batch((batch_size, n_id, offset, count))
        if batch is None:
            if not x.size(0) == adj_t.size(0) == adj_t.size(1):
                raise ValueError(
                    f"adj_t is {list(adj_t.shape)} and x has {x.size(0)} rows, but the whole graph has as many rows, "
                    "columns and nodes; call model(batch.data.x, batch.data.adj_t, *batch[1:]) for a mini-batch"
                )
            return self.run_layers(x, adj_t, inputs, unchanged if self.training else self._fill)
        batch.check_inputs(x, adj_t)
        own = first_rows(adj_t, batch.size)
        self.look_at_layers(x, own, inputs)
        correction = self.correction(batch, outward, inputs, x, own)
        if isinstance(correction, CombinedPass):
            return self.run_layers(x, own, inputs, correction.between, None, correction.follow)
        return self.run_layers(
            x,
            own,
            inputs,
            lambda layer, rows: self._exchange.swap(self.tables[layer], rows, batch),
            lambda layer, rows: self._exchange.source_of(self.tables[layer], rows, batch),
            None if correction is None else correction.follow,
            None if correction is None else correction.run,
        )

    def look_at_layers(self, x: Tensor, adj_t: Tensor, inputs: dict[str, Any]) -> None:
        """See :class:`LayeredGNN`; done again when a part of the network is another one, in no step that is tried."""
        if in_backward() or torch.compiler.is_compiling():
            return
        look = self._look_of_parts()
        if look != self._look and check_locality(self, x, adj_t, inputs):
            self._look = look

    def _look_of_parts(self) -> Look:
        """Return what changes with the parts of the network, and with what is set in them."""
        return look_of(part for name, part in self.named_children() if name not in ("histories", "gradients"))

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
        batch = self._exchange.batch
        arguments = batch_size, n_id, offset, count
        if batch is None or not batch.is_made_of(arguments, history.num_embeddings):
            batch = Batch.of(arguments, history.num_embeddings)
        if batch is None:
            self._exchange.fill(history, x)
            return x
        return self._exchange.swap(history, x, batch)

    def _batch(self, arguments: BatchArguments) -> Batch | None:
        """Return the mini-batch of these arguments, as it was checked when the call began."""
        num_nodes = self.num_nodes if len(self.histories) else None
        batch = self._exchange.batch
        if batch is not None and batch.is_made_of(arguments, num_nodes):
            return batch
        return Batch.of(arguments, num_nodes)

    def _stamp(self, adj_t: Any) -> GraphStamp | None:
        """Return what tells the whole graph from others, where a pass over it fills histories."""
        own = type(self).forward is not ScalableGNN.forward
        if not self.keep_histories or not len(self.histories) or (self.training and not own):
            return None
        if not isinstance(adj_t, Tensor) or adj_t.layout != torch.sparse_csr or torch.compiler.is_compiling():
            return None
        return GraphStamp.of(adj_t) if adj_t.dim() == 2 and adj_t.device.type != "meta" else None

    def mini_inference(self, loader: Iterable[SubData]) -> Tensor:
        """Evaluate the whole graph layer by layer, in mini-batches, and fill the histories on the way.

        The graph may be another one than that of the histories, larger for instance: its own are then made for the
        time of the call, and those of the network are left alone. Mini-batches of a SubgraphLoader say what graph they
        are of; others are taken to be of the histories' graph.

        Every layer is evaluated for all mini-batches before the next one begins, so the result is that of the whole
        graph, to the precision of the histories. It is always computed in evaluation mode and without gradients; the
        modes of the modules are as before afterwards. Memory: one mini-batch, the result, and what the layers leave in
        their state, for all nodes.

        Args:
            loader: yields every node once, in the same mini-batches each time: an EvalSubgraphLoader.

        Returns:
            [num_nodes, out_channels], on the histories' device.

        Raises:
            TypeError: a derived class has a ``forward`` of its own, which would not be called, and does not say
                ``layers_written_out = True``.
            ValueError: the loader leaves out nodes, or changes its mini-batches; or the network has forward hooks.
        """
        check_layerwise(self, "forward_layer")
        with evaluating(self):
            return LayerWise(self, loader, self._tables_for).run(self.emb_device)

    def _tables_for(self, graph: GraphStamp | None) -> Tables:
        """Return the network's histories if they are a graph's, and else make some for it."""
        num_nodes = self.num_nodes if graph is None else graph.num_nodes
        if self._takes(graph):
            return Tables(num_nodes, self.tables, self._exchange)
        fresh = fresh_histories(self.tables, self.parameters(), *([] if num_nodes == self.num_nodes else [num_nodes]))
        return Tables(num_nodes, fresh, Exchange(), passing=True)

    def _takes(self, graph: GraphStamp | None) -> bool:
        """Whether the histories take what is computed of a graph; they are then this one's."""
        if not self.keep_histories or not all(graph is None or belongs(history, graph) for history in self.tables):
            return False
        for history in self.tables:
            take_graph(history, graph)
        return True

    def true_rows(self, loader: Iterable[SubData], take: Callable[[int, TrueRows], None]) -> None:
        """Compute what each history would hold if it were exact, layer by layer in mini-batches; they stay as they are.

        Args:
            loader: see :meth:`mini_inference`.
            take: gets the number of a history, and its rows in pieces: nodes [rows] and embeddings [rows, channels];
                over ranks, those of this one.

        Raises:
            ValueError: the loader is of another graph than the histories; see :meth:`mini_inference` too.
        """
        fresh: list[Any] = fresh_histories(self.tables, self.parameters())

        def tables_for(graph: GraphStamp | None) -> Tables:
            check_graph(self.tables, graph)
            return Tables(self.num_nodes, fresh, Exchange(), passing=True)

        def finished(layer: int, _: States) -> None:
            every = torch.split(fresh[layer].own_nodes, _ROWS_AT_ONCE)
            take(layer, ((n_id, fresh[layer].pull_own(n_id)) for n_id in every))

        check_layerwise(self, "forward_layer")
        with evaluating(self):
            LayerWise(self, loader, tables_for).run(torch.device("cpu"), finished)

    def extend(self, num_nodes: int, loader: Iterable[SubData] | None = None) -> Tensor | None:
        """Append rows for new nodes, which are numbered behind those that there are, and fill them by inference.

        Args:
            num_nodes: of the graph from now on.
            loader: yields every node of the grown graph once, see :meth:`mini_inference`; the rows of the old nodes
                become exact too. ``None``: new rows are 0, as never pushed.

        Returns:
            What layer-wise inference returns; ``None`` without a loader.

        Raises:
            ValueError: there are more nodes already, or the loader is of a graph of another size.
            HistoryFileError: there is no room for larger files.
        """
        num_nodes = as_count("num_nodes", num_nodes, least=self.num_nodes)
        graph = loader.graph if isinstance(loader, SubgraphLoader) else None
        if graph is not None and graph.num_nodes != num_nodes:
            raise ValueError(f"the loader's graph has {graph.num_nodes} nodes (expected {num_nodes}, those of extend)")
        for history in self.tables:
            history.extend(num_nodes)
            history.graph = None  # it has edges to and from the new nodes
        self.num_nodes = num_nodes
        if self.gradients is not None:
            self.gradients.extend(num_nodes)
            self._ways, self._steady = {}, {}
        return None if loader is None else self.mini_inference(loader)

    def _make_histories(self) -> None:
        if self.compensate and not self._forward_is_by_layers():
            raise ValueError(
                f"{type(self).__name__} has a forward of its own, but compensate=True needs histories and layers that "
                f"are written in {self._written_in} alone"
            )
        super()._make_histories()

    def _forward_is_by_layers(self) -> bool:
        return type(self).forward is ScalableGNN.forward

    def _fill(self, layer: int, rows: Tensor) -> Tensor:
        self._exchange.fill(self.tables[layer], rows)
        return rows


def unchanged(layer: int, rows: Tensor) -> Tensor:
    """Return the rows that come between two layers as they are."""
    return rows
