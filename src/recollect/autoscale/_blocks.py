"""The blocks of a blockwise network as layers of their own, the edges that they take, and the rows around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._torch import is_recorded
from recollect._transfer import sent
from recollect._verdicts import later
from recollect.autoscale._adjacency import as_csr, edge_index_of, is_edge_index
from recollect.autoscale._batch import Batch
from recollect.autoscale._network import LayeredGNN, State
from recollect.autoscale._outside import matches
from recollect.autoscale.histories._rows_source import Rows
from recollect.autoscale.loader._outward import Outward
from recollect.messages import version_of

if TYPE_CHECKING:
    from recollect.autoscale._block_compensation import LayerCompensation
    from recollect.autoscale._blockwise import BlockwiseGNN

__all__ = ["WEIGHTS", "Around", "Blocks", "OneBlock", "edges_of", "factors_outside", "first_input"]

WEIGHTS = "edge_weight"
"""What the weights of an adjacency are called among what blocks take."""


@dataclass(frozen=True)
class Around:
    """What a layer reads of the nodes around a mini-batch.

    Attributes:
        inputs: their rows of the layer's input [halo, hidden_channels].
        outputs: and of its output; constants.
        sources: what brings these back in backward; ``None``: they are kept.
        compensation: with ``compensate=True``, what completes the gradients of the layer's blocks.

    Example:
        >>> import torch
        >>> from recollect.autoscale import SubgraphLoader, get_data, partition, permute
        >>> from recollect.models import RevGNN
        >>> class Watched(RevGNN):
        ...     def run_stage(self, index, x, edge_index, shared, args, around):
        ...         found.append(around)
        ...         return super().run_stage(index, x, edge_index, shared, args, around)
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> perm, ptr = partition(data.adj_t, 2, "contiguous", log=False)
        >>> batch = next(iter(SubgraphLoader(permute(data, perm, log=False), ptr, log=False)))
        >>> model, found = Watched(in_channels, 8, out_channels, num_layers=3, num_nodes=34), []
        >>> model(batch.data.x, batch.data.adj_t, *batch[1:]).shape
        torch.Size([17, 4])
        >>> halo = len(batch.n_id) - batch.batch_size
        >>> [tuple(around.outputs.shape) for around in found] == 3 * [(halo, 8)]
        True
    """

    inputs: Tensor
    outputs: Tensor
    sources: tuple[Rows | None, Rows]
    compensation: LayerCompensation | None = None


class Blocks(LayeredGNN):
    """The blocks of all layers as layers of their own: x is a block's input, and the stream is in the state.

    What one returns is the next one's input. After the last block there is one layer more, which is the head.
    """

    def __init__(self, model: BlockwiseGNN) -> None:
        super().__init__(model.num_layers * model.num_groups + 1)
        self.model = model
        self.inputs = model.inputs

    def run_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`LayeredGNN`."""
        model, size = self.model, adj_t.size(0)
        index, group = divmod(layer, model.num_groups)
        if index == model.num_layers:
            return torch.cat(state["groups"], 1)
        edge_index, args = edges_of(adj_t, model.conv_inputs, {name: state[name] for name in self.inputs})
        if layer == 0:
            model.look_at_parts(x, args)
            groups = model.enter(x).chunk(model.num_groups, 1)
            state["groups"] = [one[:size] for one in groups]
            x = first_input(groups)
        found = model.run_block(index, group, x, edge_index, args)[:size]
        new = list(state["groups"])
        new[group] = model.add(index, group, new[group], found)
        state["groups"] = new
        return new[group] if group < model.num_groups - 1 else first_input(new)

    def readout(self, x: Tensor, state: State) -> Tensor:
        """See :class:`LayeredGNN`."""
        return self.model.classify(x)


class OneBlock(LayeredGNN):
    """Each block alone as a layer: from its input to what it adds to its group, for the adjacency's targets.

    The number of a block is ``index * C + group``. Behind the channels of x stand the factors that the block multiplies
    its input by, if there are any.

    Args:
        model: gives the blocks.
        masked: whether x has factors.
    """

    def __init__(self, model: BlockwiseGNN, masked: bool = False) -> None:
        super().__init__(model.num_layers * model.num_groups)
        self.model = model
        self.inputs = model.inputs
        self.masked = masked
        self._edges: dict[int, tuple[Tensor, Tensor]] = {}  # of each adjacency, for which blocks keep what they make

    def run_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`LayeredGNN`."""
        index, group = divmod(layer, self.model.num_groups)
        if id(adj_t) not in self._edges:
            self._edges[id(adj_t)] = adj_t, edge_index_of(adj_t)
        _, edge_index = self._edges[id(adj_t)]
        args = tuple(adj_t.values() if name == WEIGHTS else state[name] for name in self.model.conv_inputs)
        z, mask = x.chunk(2, 1) if self.masked else (x, None)
        return self.model.run_block(index, group, z, edge_index, args, mask)[: adj_t.size(0)]


def first_input(groups: Sequence[Tensor]) -> Tensor:
    """Return what the first block of a layer reads."""
    return sum(groups[2:], start=groups[1])


# The edges of an adjacency, as long as it lives: blocks find what they made of them before.
_EDGES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept_edges(adj_t: Tensor) -> Tensor:
    """Return the edges [2, E] of an adjacency: the same tensor at each call, unless one of the two was written into."""
    if is_recorded():
        return edge_index_of(adj_t)
    known: tuple[Tensor, int, int] | None = _EDGES.get(adj_t, None)  # type: ignore[no-untyped-call]
    if known is None or (known[0]._version, version_of(adj_t)) != known[1:]:
        with torch.inference_mode(False), torch.no_grad():
            edge_index = edge_index_of(adj_t)
        known = _EDGES[adj_t] = edge_index, edge_index._version, version_of(adj_t)
    return known[0]


def _refuse_weights(numbers: list[list[Any]]) -> None:
    if numbers[0][0]:
        raise ValueError(
            "the adjacency has weights other than 1, and the convolutions are given none; make the network with "
            "inputs=('edge_weight',), which gives them to each convolution after edge_index, or the adjacency without "
            "weights"
        )


def edges_of(graph: Any, names: Sequence[str], inputs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return the edges as blocks take them, and what they take beside.

    Args:
        graph: an adjacency in sparse CSR form, or an ``EdgeIndex``; in any other form it is left as it is.
        names: of what blocks take, in order.
        inputs: what the network was called with, by name.

    Raises:
        ValueError: something is missing, or nobody takes it; or the adjacency has weights that nobody takes.
    """
    given = dict(inputs)
    if is_edge_index(graph) or (isinstance(graph, Tensor) and graph.layout == torch.sparse_csr):
        adj_t = as_csr(graph, given.pop(WEIGHTS, None))
        graph, given[WEIGHTS] = _kept_edges(adj_t), adj_t.values()
        if WEIGHTS not in names:
            later([(given[WEIGHTS] != 1).any().to(torch.int64)], _refuse_weights)
    missing = [name for name in names if name not in given]
    unknown = inputs.keys() - set(names)
    if missing or unknown:
        raise ValueError(
            f"the network was made with inputs={tuple(names)}, and is to be called with these by name (missing: "
            f"{', '.join(missing) or 'none'}; not among them: {', '.join(sorted(unknown)) or 'none'})"
        )
    return graph, tuple(given[name] for name in names)


def factors_outside(model: BlockwiseGNN, shared: Any, batch: Batch, outward: Outward) -> list[Tensor]:
    """Return what blocks multiply the rows of other nodes by, for each group [T + S, hidden_channels / C].

    Nodes of the halo have what the mini-batch shares for them. It shares nothing for those further away: theirs is
    made, or drawn, here.

    Args:
        model: gives the blocks.
        shared: what the mini-batch's layers share.
        batch: the mini-batch.
        outward: its edges to nodes outside.

    Raises:
        ValueError: there are nodes further away, and no features of them.
    """
    size, targets = batch.size, outward.num_targets
    beyond = torch.cat([outward.n_id[:targets], outward.n_id[targets + size :]])
    near, place = matches(beyond, batch.n_id[size:].to(beyond.device))  # where the numbers are, the host
    far = torch.ones_like(beyond, dtype=torch.bool).index_fill_(0, near, False).nonzero().squeeze(1)
    masks, drawn = [model.mask_of(shared, group).detach() for group in range(model.num_groups)], None
    device = masks[0].device
    if far.numel():
        if "x" not in outward.nodes:
            raise ValueError(
                "what layers share for nodes two steps away (dropout) is made from their features, and the loader's "
                "graph has no x"
            )
        features = outward.nodes["x"]
        places = torch.where(far < targets, far, far + size)
        with torch.no_grad():
            drawn = model.share(model.enter(sent(features[sent(places, features.device)], device)))
    near, place, far, found = sent(near, device), sent(place + size, device), sent(far, device), []
    for group, mask in enumerate(masks):
        rows = mask.new_empty(beyond.numel(), mask.size(1)).index_copy_(0, near, mask[place])
        found.append(rows if drawn is None else rows.index_copy_(0, far, model.mask_of(drawn, group).to(rows)))
    return found
