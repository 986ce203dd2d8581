"""Networks whose layers are blocks that read each other's output: they need two histories for each layer's halo."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale._adjacency import as_csr, first_rows
from recollect.autoscale._batch import Batch
from recollect.autoscale._block_compensation import BlockCompensation, BlockWays
from recollect.autoscale._block_refresh import BlockSweep
from recollect.autoscale._blocks import WEIGHTS, Around, Blocks, edges_of
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._inference import (
    LayerWise,
    States,
    Tables,
    check_layerwise,
    evaluating,
    forward_of_its_own,
)
from recollect.autoscale._making import widths_of
from recollect.autoscale._network import Between, Follow, Run, SourceOf
from recollect.autoscale._refresh import Loss
from recollect.autoscale._scalable import ScalableGNN, TrueRows, unchanged
from recollect.autoscale._stamp import GraphStamp, check_graph
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._rows_source import Pulls
from recollect.autoscale.histories._selection import numbers_of
from recollect.autoscale.loader._outward import Outward
from recollect.autoscale.loader._sub_data import SubData

__all__ = ["BlockwiseGNN"]


class BlockwiseGNN(ScalableGNN):
    """A network with layers of several blocks, each of which reads what the one before it wrote, of neighbours too.

    The stream that goes through the layers has C groups of channels. Block i of a layer reads one group (the first
    block: the sum of all groups but the first) and adds to group i. So of the nodes around a mini-batch the groups are
    needed as they were before the layer and as they are behind it. Each layer's output has a history, the last one's
    too.

    Args:
        num_nodes: N; ``None``: whole graphs alone, and no histories.
        hidden_channels: of the stream.
        num_layers: L; there are L histories.
        inputs: names of what each block gets after ``edge_index`` where the graph is an adjacency, in order:
            ``"edge_weight"``, its weights, or what the call brings by this name.
        num_groups: C; needed with ``compensate=True``, and otherwise may be set later.
        **options: of :class:`ScalableGNN`, from ``pool_size`` on.

    Attributes:
        conv_inputs: ``inputs``.
        num_groups: C, which each network sets, if it is not given.

    Example:
        >>> from recollect.autoscale import BlockwiseGNN, get_data
        >>> from recollect.models import RevGNN
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> model = RevGNN(in_channels, 8, out_channels, num_layers=3, num_nodes=34)
        >>> isinstance(model, BlockwiseGNN), model.num_groups
        (True, 2)
        >>> [history.embedding_dim for history in model.histories]  # the last layer has one too
        [8, 8, 8]
        >>> model(data.x, data.adj_t).shape  # of the whole graph
        torch.Size([34, 4])
    """

    num_groups: int
    _written_in = "run_block"
    _block_ways: BlockWays

    def __init__(
        self,
        num_nodes: int | None,
        hidden_channels: int,
        num_layers: int,
        *,
        inputs: Sequence[str] = (),
        num_groups: int | None = None,
        **options: Any,
    ) -> None:
        if num_groups is not None:
            self.num_groups = num_groups
        super().__init__(num_nodes, hidden_channels, num_layers, **options)
        self.conv_inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self.inputs = tuple(name for name in self.conv_inputs if name != WEIGHTS)

    def _make_histories(self) -> None:
        if self.combine is not None:
            raise ValueError(
                f"{type(self).__name__} has no combined rows: leave out combine=, whose fresh rows would be those of "
                "each block at the nodes around a mini-batch; compensate=True alone corrects gradients"
            )
        super()._make_histories()

    def _forward_is_by_layers(self) -> bool:
        return forward_of_its_own(self, "run_block") is None

    def keep_gradients(self) -> None:
        """See :class:`CorrectedGNN`; a history for each block but the first."""
        self._block_ways = BlockWays()
        super().keep_gradients()
        if self.gradients is not None:  # the last block's too, whose width is known
            self.gradients.table(self.num_layers * self.num_groups - 1, self._group_width())

    def _gradient_widths(self) -> list[int]:
        return [self._group_width()] * (self.num_layers * self.num_groups - 2)

    def _group_width(self) -> int:
        return sum(self._widths()[:1]) // self.num_groups

    def _sweep_gradients(
        self, num_nodes: int, loader: Iterable[SubData], gradients: GradientHistories, loss: Loss
    ) -> None:
        BlockSweep(self, num_nodes, loader, self.tables, gradients, loss).run()

    def _count_of(self, num_nodes: int | None) -> int:
        return 0 if num_nodes is None else super()._count_of(num_nodes)

    def _widths(self) -> list[int]:
        return widths_of(self.hidden_channels, self.num_layers + 1)

    # What each network writes.

    @abstractmethod
    def stages(self) -> Iterable[tuple[str, nn.Module]]:
        """Return the modules of the layers, with their names."""

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """Return the first layer's input [n, hidden_channels], of features [n, in_channels], row by row."""

    @abstractmethod
    def share(self, x: Tensor) -> Any:
        """Return what all layers of a pass have in common (a dropout mask), for the first one's input."""

    @abstractmethod
    def run_stage(
        self, index: int, x: Tensor, edge_index: Any, shared: Any, args: tuple[Any, ...], around: Around | None
    ) -> Tensor:
        """Return a layer's output for the rows of its input; what it shares has rows for those around them too."""

    def check_parts(self, x: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse blocks that need more than the edges into a mini-batch's nodes, and what does not go row by row.

        Called before the first mini-batch, and before the next one when something has changed.

        Args:
            x: features of some nodes [n, in_channels].
            args: what blocks get of the edges.

        Raises:
            ValueError: there is such a block, or such a function.
        """

    @abstractmethod
    def run_block(
        self, index: int, group: int, z: Tensor, edge_index: Any, args: tuple[Any, ...], mask: Tensor | None = None
    ) -> Tensor:
        """Return what a block adds to its group, of its input [n, hidden_channels / C].

        Args:
            index: of the layer.
            group: of the block.
            z: its input.
            edge_index: the graph.
            args: what it gets of the edges.
            mask: what :meth:`mask_of` returns of what layers share; ``None``: nothing is shared.
        """

    def mask_of(self, shared: Any, group: int) -> Tensor:
        """Return what blocks of a group multiply their input by, of what layers share [n, hidden_channels / C].

        Needed with ``compensate=True``, where layers share something.
        """
        raise NotImplementedError(f"compensate=True: {type(self).__name__} shares something, and has no mask_of")

    def block_of(self, index: int, group: int) -> nn.Module:
        """Return the module that :meth:`run_block` runs; needed with ``compensate=True``."""
        raise NotImplementedError(f"compensate=True: {type(self).__name__} has no block_of(index, group)")

    @abstractmethod
    def add(self, index: int, group: int, x: Tensor, found: Tensor) -> Tensor:
        """Return a group of the stream to which the output of its block was added, without a gradient."""

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Return the network's output, of the last layer's, row by row."""

    # What derives from it.

    def look_at_parts(self, x: Tensor, args: tuple[Any, ...]) -> None:
        """Call :meth:`check_parts` if that was not done for the network as it is now, on edges."""
        look = self._look_of_parts()
        if look != self._look:
            with evaluating(self):
                self.check_parts(x, args)
            if all(value.size(0) for value in args):  # without edges nothing is seen of what blocks do with them
                self._look = look
            self._block_ways = BlockWays()

    def extend(self, num_nodes: int, loader: Iterable[SubData] | None = None) -> Tensor | None:
        """See :meth:`ScalableGNN.extend`."""
        self._look = None
        return super().extend(num_nodes, loader)

    def forward(self, x: Tensor, edge_index: Any, *args: Any, **inputs: Any) -> Tensor:  # type: ignore[override]
        """Return the network's output for a whole graph, or for a mini-batch; see :meth:`ScalableGNN.forward`.

        Args:
            x: features of all nodes, or of the mini-batch's and its halo's [B + halo, in_channels].
            edge_index: a graph. Of an adjacency in sparse CSR form, blocks get the edges as ``edge_index``.
            *args: ``batch_size``, ``n_id``, ``offset`` and ``count`` of a mini-batch.
            **inputs: what ``inputs`` names, but for weights of an adjacency; ``outward``, a mini-batch's
                ``data.outward``, with ``compensate=True``.

        Raises:
            TypeError, ValueError, IndexError, NotImplementedError: as :meth:`ScalableGNN.forward`.
        """
        outward = inputs.pop("outward", None)
        batch = self._batch(args or (None, None, None, None))
        if batch is None:
            return self.run_layers(x, edge_index, inputs, unchanged if self.training else self._fill)
        adj_t = as_csr(edge_index)
        batch.check_inputs(x, adj_t)
        return self._on_batch(x, first_rows(adj_t, batch.size), batch, inputs, outward)

    def run_layers(
        self,
        x: Tensor,
        adj_t: Any,
        inputs: dict[str, Any],
        between: Between,
        source_of: SourceOf | None = None,
        follow: Follow | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Evaluate all layers on a whole graph; ``between`` gets the output of each, the last one's too."""
        return self.on_whole(x, *edges_of(adj_t, self.conv_inputs, inputs), between)

    def on_whole(self, x: Tensor, edge_index: Any, args: tuple[Any, ...], between: Between = unchanged) -> Tensor:
        """Evaluate all layers on a whole graph in the form that blocks take, with their further arguments."""
        x = self.enter(x)
        shared = self.share(x)
        for index in range(self.num_layers):
            x = between(index, self.run_stage(index, x, edge_index, shared, args, None))
        return self.classify(x)

    def _on_batch(
        self, x: Tensor, adj_t: Tensor, batch: Batch, inputs: dict[str, Any], outward: Outward | None
    ) -> Tensor:
        """Evaluate all layers on a mini-batch; each history is pulled once, and once more in backward."""
        edge_index, args = edges_of(adj_t, self.conv_inputs, inputs)
        self.look_at_parts(x, args)
        outward = self.checked_outward(outward, adj_t, bool(self._block_ways.of_blocks))
        x = self.enter(x)
        shared = self.share(x)
        correction = None
        if outward is not None and self.gradients is not None:
            ways = self._block_ways
            correction = BlockCompensation(self, self.gradients, self.tables, batch, outward, inputs, shared, ways)
            correction.observe(x[: batch.size])
        own, before = x[: batch.size], x[batch.size :].clone()  # of which the first layer keeps the latter alone
        del x
        pulls, source = Pulls(), None
        for index, history in enumerate(self.tables):
            behind = self._exchange.halo_source(history, batch, pulls)
            after = self._exchange.pull(history, batch).to(own)
            joint = None if correction is None else correction.of(index)
            around = Around(before, after, (source, behind), joint)
            own = self.run_stage(index, own, edge_index, shared, args, around)
            self._exchange.push(history, own, batch)
            before, source = after, behind
        return self.classify(own)

    def mini_inference(self, loader: Iterable[SubData]) -> Tensor:
        """Evaluate the whole graph block by block, in mini-batches, and fill the histories on the way.

        See :meth:`ScalableGNN.mini_inference`. The result is exact, whatever the histories are kept in. Memory: one
        mini-batch, the result, and in host memory the stream, and two of its groups once more, for all nodes.
        """

        def write(index: int, pieces: TrueRows) -> None:
            for n_id, rows in pieces:
                self.tables[index].push(rows, n_id)

        with evaluating(self):
            return self._block_by_block(loader, self._takes, write)

    def true_rows(self, loader: Iterable[SubData], take: Callable[[int, TrueRows], None]) -> None:
        """See :meth:`ScalableGNN.true_rows`."""

        def takes(graph: GraphStamp | None) -> bool:
            check_graph(self.tables, graph)
            return True

        with evaluating(self):
            self._block_by_block(loader, takes, take)

    def _block_by_block(
        self,
        loader: Iterable[SubData],
        takes: Callable[[GraphStamp | None], bool],
        take: Callable[[int, TrueRows], None],
    ) -> Tensor:
        """Evaluate each block for all mini-batches before the next one begins.

        Args:
            loader: yields every node once, in the same mini-batches each time.
            takes: from the graph to whether the output of each layer is wanted.
            take: gets the number of a layer, and its output in pieces.
        """
        check_layerwise(self, "run_block", self.stages())
        view, wanted = Blocks(self), False
        exact = next(self.parameters()).dtype == torch.float64
        channels = self._group_width()

        def tables_for(graph: GraphStamp | None) -> Tables:
            nonlocal wanted
            wanted = takes(graph)
            num_nodes = self.num_nodes if graph is None else graph.num_nodes
            dtype = torch.float64 if exact else torch.float32
            group = self.tables[0].shares if wanted else None
            pair = [History(num_nodes, channels, dtype=dtype, process_group=group) for _ in range(2)]
            return Tables(num_nodes, [pair[layer % 2] for layer in range(view.num_layers - 1)], Exchange())

        def finished(layer: int, states: States) -> None:
            index, group = divmod(layer, self.num_groups)
            if wanted and group == self.num_groups - 1:
                take(index, ((numbers_of(rows), torch.cat(state["groups"], 1)) for rows, state in states.items()))

        return LayerWise(view, loader, tables_for).run(self.emb_device, finished)
