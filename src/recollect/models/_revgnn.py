"""RevGNN: hundreds of message-passing layers in the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect._arguments import as_count
from recollect._parameters import reset_parameters
from recollect.autoscale import Around, BlockwiseGNN
from recollect.frames import Lattice, digits_of
from recollect.messages.reach import Probe, copied, kind_of, move, other_numbers
from recollect.messages.rows import by_structure, goes_by_rows, some_rows
from recollect.models._convs import make_conv
from recollect.models._dropout import dropout, dropout_mask
from recollect.models._whole import check_whole
from recollect.reversible import Beside, GroupAddRev

__all__ = ["RevGNN"]

# Named convolutions that amplify rounding: at 64 layers in float32 the gradient was wrong by up to 2e-2 without
# anchors, and by 6e-6 with them.
_ANCHORS = {"gen": 8}

Norm = Literal["layer", "batch"]
Task = Literal["multiclass", "multilabel"]


def _make_norm(norm: Norm | None, channels: int) -> nn.Module:
    if norm is None:
        return nn.Identity()
    if norm == "layer":
        return nn.LayerNorm(channels)
    if norm == "batch":
        return nn.BatchNorm1d(channels)
    raise ValueError(f"norm={norm!r} is unknown; choose 'layer', 'batch' or None")


class _Block(nn.Module):
    """Pre-activation block "res+": norm, ReLU, dropout, convolution."""

    def __init__(self, conv: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.dropout = dropout
        self.conv = conv

    def reset_parameters(self) -> None:
        reset_parameters(self.norm)
        reset_parameters(self.conv)

    def forward(self, x: Tensor, edge_index: Any, mask: Tensor | None = None, *args: Any) -> Tensor:
        x = self.norm(x).relu()
        x = dropout(x, self.dropout, self.training) if mask is None else x * mask
        output: Tensor = self.conv(x, edge_index, *args)
        return output


class RevGNN(BlockwiseGNN):
    """The grouped reversible network of "Training Graph Neural Networks with 1000 Layers" (arXiv 2106.07476).

    Input projection, ``num_layers`` reversible layers whose blocks are (norm, ReLU, dropout, conv), a final norm, and a
    linear head. Its activations need the memory of one layer, whatever the depth.

    With ``num_nodes`` it trains on mini-batches of a graph too, as any
    :class:`~recollect.autoscale.ScalableGNN` does: ``model(batch.data.x, batch.data.adj_t, *batch[1:])``. A layer reads
    its input of the nodes around the mini-batch from the history of the layer before, and their partial outputs from
    its own. In backward the mini-batch's rows come back by inversion, and those around it are pulled again. So a step
    needs the memory of one layer and one mini-batch, whatever the depth and the graph. With ``compensate=True``
    gradients that go through nodes outside are added block by block, from histories of gradients.

    Args:
        in_channels: of the node features.
        hidden_channels: of the layers; divisible by ``num_groups``.
        out_channels: classes, or labels.
        num_layers: L, at least 1.
        num_groups: C, at least 2.
        conv: ``"sage"``, ``"gcn"``, ``"gin"``, ``"gat"``, ``"gen"``, ``"graphconv"``, or a function that makes a layer
            ``conv(x, edge_index, *args)`` from the number of channels of one group.
        dropout: probability in [0, 1).
        norm: ``"layer"``, ``"batch"`` or ``None``, in the blocks and before the head.
        shared_dropout: one mask for all layers, as in the paper; otherwise each layer draws its own.
        tied: all layers share one set of parameters (the paper's WT-RevGNN).
        task: ``"multiclass"`` (one class per node) or ``"multilabel"`` (independent labels); decides :meth:`loss` and
            :meth:`predict`.
        anchor_every: keep every s-th activation; bounds the drift of the reconstruction. ``None``: none are kept, but
            for ``"gen"``, whose softmax amplifies rounding, every 8th.
        disable: run plain, keeping everything.
        conv_kwargs: options of a conv that is given by name; ``heads`` of "gat" must divide the channels of a group
            (default: the most that do, up to 4).
        certify: as in :class:`~recollect.reversible.GroupAddRev`.
        exact: as in :class:`~recollect.reversible.GroupAddRev`; activations are then not kept for ``"gen"`` either.
        num_nodes: N of the graph whose mini-batches it trains on; ``None``: whole graphs alone. What a convolution
            returns for a node must then depend on the edges into it alone, and not on degrees of its neighbours.
        inputs: with ``num_nodes``, what each convolution gets after ``edge_index``; see
            :class:`~recollect.autoscale.BlockwiseGNN`.
        **histories: with ``num_nodes``, options of :class:`~recollect.autoscale.ScalableGNN` by name, from
            ``pool_size`` on: ``history_dtype``, ``history_path``, ``compensate``, ...; but for ``combine``.

    Shapes:
        - ``x``: [num_nodes, in_channels]; output: logits [num_nodes, out_channels]. Of a mini-batch, ``x`` is
          [B + halo, in_channels] and the output [B, out_channels].

    Raises:
        ValueError: a value is out of range; the message says what is allowed.
        TypeError: options of histories without ``num_nodes``.

    Example:
        >>> import torch
        >>> from recollect.models import RevGNN
        >>> model = RevGNN(in_channels=5, hidden_channels=8, out_channels=3, num_layers=28)
        >>> x, edge_index = torch.randn(6, 5), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
        >>> logits = model(x, edge_index)
        >>> model.loss(logits, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        >>> logits.shape, model.last_drift < 1e-3
        (torch.Size([6, 3]), True)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        num_groups: int = 2,
        conv: str | Callable[[int], nn.Module] = "sage",
        dropout: float = 0.0,
        *,
        norm: Norm | None = "layer",
        shared_dropout: bool = True,
        tied: bool = False,
        task: Task = "multiclass",
        anchor_every: int | None = None,
        disable: bool = False,
        conv_kwargs: dict[str, Any] | None = None,
        certify: bool | Literal["exact"] = True,
        exact: bool | int = False,
        num_nodes: int | None = None,
        inputs: Sequence[str] = (),
        **histories: Any,
    ) -> None:
        if anchor_every is None and isinstance(conv, str) and exact is False:
            anchor_every = _ANCHORS.get(conv)
        in_channels, out_channels = as_count("in_channels", in_channels), as_count("out_channels", out_channels)
        hidden_channels, num_layers = as_count("hidden_channels", hidden_channels), as_count("num_layers", num_layers)
        num_groups = as_count("num_groups", num_groups, least=2)
        if hidden_channels % num_groups:
            raise ValueError(
                f"hidden_channels={hidden_channels} is not divisible by num_groups={num_groups}; the next that is: "
                f"{hidden_channels + num_groups - hidden_channels % num_groups}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1) (got {dropout})")
        if task not in ("multiclass", "multilabel"):
            raise ValueError(f"task={task!r} is unknown; choose 'multiclass' or 'multilabel'")
        if num_nodes is None and (histories or inputs):
            raise TypeError(
                f"{', '.join(sorted(histories)) or 'inputs'}: these are for mini-batches, and need num_nodes=, the "
                "number of nodes of their graph"
            )
        if histories.get("recompute"):
            raise ValueError(
                "recompute=True is for layers that are kept, and these come back by inversion; leave it out"
            )
        if num_nodes is not None and conv == "gcn" and (conv_kwargs or {}).get("normalize", True):
            raise ValueError(
                "conv='gcn' divides by the degrees of neighbours, which a mini-batch does not know of its halo; "
                "normalise the whole graph's adjacency (recollect.autoscale.normalize) before the loader is made, and "
                "give conv_kwargs={'normalize': False} and inputs=('edge_weight',)"
            )
        super().__init__(num_nodes, hidden_channels, num_layers, inputs=inputs, num_groups=num_groups, **histories)
        self.dropout = dropout
        self.shared_dropout = shared_dropout
        self.tied = tied
        self.task = task
        channels = hidden_channels // num_groups
        self.project = nn.Linear(in_channels, hidden_channels)
        self.layers = nn.ModuleList(
            GroupAddRev(
                _Block(make_conv(conv, channels, **(conv_kwargs or {})), _make_norm(norm, channels), dropout),
                num_groups=num_groups,
                disable=disable,
                chunk_args=(0,),
                anchor_every=anchor_every,
                certify=certify,
                exact=exact,
            )
            for _ in range(1 if tied else num_layers)
        )
        self.norm = _make_norm(norm, hidden_channels)
        self.head = nn.Linear(hidden_channels, out_channels)

    @property
    def disable(self) -> bool:
        """Whether the layers run plain, keeping everything; can be set at any time between steps."""
        return all(layer.disable for layer in self._groups())

    @disable.setter
    def disable(self, value: bool) -> None:
        for layer in self._groups():
            layer.disable = value

    @property
    def last_drift(self) -> float | None:
        """The largest relative reconstruction error that the last backward measured, NaN if one was, or ``None``."""
        return GroupAddRev.largest_drift(self._groups())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits; see :meth:`forward`, and :meth:`mini_inference` of ``loader=``."""
        if self.num_nodes:
            if "edge_index" in kwargs:
                kwargs["adj_t"] = kwargs.pop("edge_index")
            return super().__call__(*args, **kwargs)
        check_whole(*args, **kwargs)
        logits: Tensor = nn.Module.__call__(self, *args, **kwargs)
        return logits

    def forward(self, x: Tensor, edge_index: Any, *args: Any, **inputs: Any) -> Tensor:  # type: ignore[override]
        """Return the logits.

        Args:
            x: node features [num_nodes, in_channels]; of a mini-batch and its halo [B + halo, in_channels].
            edge_index: the graph, in whatever form the convolution takes. With ``num_nodes`` it may be an adjacency in
                sparse CSR form too, whose edges the convolutions get as ``edge_index``.
            *args: further arguments of the convolution (edge weights, edge features), given whole to every block. With
                ``num_nodes``, ``batch_size``, ``n_id``, ``offset`` and ``count`` of a mini-batch.
            **inputs: with ``num_nodes``, what ``inputs`` names; ``outward``, a mini-batch's ``data.outward``, with
                ``compensate=True``.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: a sparse adjacency is not that of the nodes in ``x``, such as a mini-batch's without
                ``num_nodes``; or the mini-batch is not one of this graph, permuted. Nothing was written then.
            NotImplementedError: ``compensate=True`` needs more edges of the nodes outside; nor then.
        """
        if not self.num_nodes:
            return self.on_whole(x, edge_index, args)
        if not any(value is not None for value in args):
            check_whole(x, edge_index)
        return super().forward(x, edge_index, *args, **inputs)

    def enter(self, x: Tensor) -> Tensor:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        x = self.embed(x)
        digits = digits_of(self.layer(0).exact, x.dtype)
        return x if digits is None else Lattice(digits).enter(x)

    def share(self, x: Tensor) -> Tensor | None:
        """Return one dropout mask for all layers, scaled; ``None`` where each block draws its own or none is needed."""
        return self._mask(x)

    def run_stage(
        self, index: int, x: Tensor, edge_index: Any, shared: Any, args: tuple[Any, ...], around: Around | None
    ) -> Tensor:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        beside = None
        if around is not None:
            beside = Beside(around.inputs, around.outputs, around.sources, around.compensation)
        out: Tensor = self.layer(index)(x, edge_index, shared, *args, **({} if beside is None else {"beside": beside}))
        return out

    def stages(self) -> Iterable[tuple[str, nn.Module]]:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        return [(f"layers.{name}", layer) for name, layer in self.layers.named_children()]

    def around(self) -> list[nn.Module]:
        """Return what :meth:`embed` and :meth:`classify` may use: all but the layers and the histories."""
        others = (self.layers, self.histories, self.gradients)
        return [child for child in self.children() if not any(child is other for other in others)]

    def buffers_around(self) -> list[Tensor]:
        """Return the buffers that :meth:`embed` and :meth:`classify` may use."""
        return [*self.buffers(recurse=False), *(buffer for module in self.around() for buffer in module.buffers())]

    def check_parts(self, x: Tensor, args: tuple[Any, ...]) -> None:
        """See, on a small graph, whether the edges into a node are all that blocks need; and what goes row by row."""
        self.check_rows(x)
        self._check_blocks(args)

    def check_rows(self, x: Tensor) -> None:
        """Check that :meth:`embed` and :meth:`classify` go row by row, in the mode in which the network is.

        A copy is looked at, as it is and with other parameters, unless :meth:`goes_by_rows` says that it does.

        Args:
            x: features of some nodes [n, in_channels].

        Raises:
            ValueError: a row of what one of them returns depends on other rows.
        """
        if self.goes_by_rows():
            return
        around = self.around()
        found = copied(self, [child for child in self.children() if child not in around])
        generator, weight, x = torch.Generator().manual_seed(0), found.project.weight, some_rows(x)
        h = torch.randn(x.size(0), weight.size(0), generator=generator).to(weight)
        own = nn.ModuleList(found.around())
        own._buffers, own._parameters = found._buffers, found._parameters
        _look_at_rows(found, own, x, h)
        move(own.parameters(), generator)
        _look_at_rows(found, own, x, h * 30)  # something else may be done with large numbers

    def goes_by_rows(self) -> bool:
        """Return whether :meth:`embed` and :meth:`classify` go row by row by what they are made of."""
        own = all(getattr(type(self), name) is method and name not in vars(self) for name, method in _OF_ROWS.items())
        return own and all(map(by_structure, (self.project, self.norm, self.head)))

    def _check_blocks(self, args: tuple[Any, ...]) -> None:
        weight, known = self.project.weight, set[Any]()
        edges = {str(place): other_numbers(value.detach().cpu(), place) for place, value in enumerate(args)}
        probe = Probe(edges, weight.size(0) // self.num_groups, weight.dtype)
        for index in range(len(self.layers)):
            for group in range(self.num_groups):
                block = self.layer(index).block(group)
                kind, name = kind_of(block), f"layer {index}, block {group}"
                if kind not in known and not probe.reach(block, name).near:
                    raise ValueError(
                        f"{name}: what its convolution returns for a node depends on more than the node and the edges "
                        "into it, such as its neighbours' degrees, and a mini-batch has no edges into its halo. Let "
                        "weights of edges say what depends on degrees (recollect.autoscale.normalize, and "
                        "inputs=('edge_weight',)), or train on the whole graph: recollect.outofcore.WholeGraph"
                    )
                known.add(kind)

    def run_block(
        self, index: int, group: int, z: Tensor, edge_index: Any, args: tuple[Any, ...], mask: Tensor | None = None
    ) -> Tensor:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        out: Tensor = self.layer(index).block(group)(z, edge_index, mask, *args)
        return out

    def mask_of(self, shared: Any, group: int) -> Tensor:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        mask: Tensor = shared.chunk(self.num_groups, 1)[group]
        return mask

    def block_of(self, index: int, group: int) -> nn.Module:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        return self.layer(index).convs[group]

    def add(self, index: int, group: int, x: Tensor, found: Tensor) -> Tensor:
        """See :class:`~recollect.autoscale.BlockwiseGNN`."""
        return self.layer(index).add(group, x, found)

    def embed(self, x: Tensor) -> Tensor:
        """Return the first layer's input [num_nodes, hidden_channels], of the features [num_nodes, in_channels]."""
        # Under autocast the projection is in half precision; the residual stream, which is inverted, must not be.
        return self.project(x).to(self.project.weight.dtype)  # type: ignore[no-any-return]

    def layer(self, index: int) -> GroupAddRev:
        """Return the reversible layer with this number, from 0; the same one for all where they are tied."""
        layer = self.layers[0 if self.tied else index]
        assert isinstance(layer, GroupAddRev)
        return layer

    def classify(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits [num_nodes, out_channels], of the last layer's output [num_nodes, hidden_channels].

        Args:
            x: the output.
            mask: what takes the place of dropout before the head, of the shape of ``x``.
        """
        x = self.norm(x).relu()
        x = dropout(x, self.dropout, self.training) if mask is None else x * mask
        logits: Tensor = self.head(x)
        return logits

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy (multi-class) or binary cross entropy (multi-label), a scalar.

        Args:
            logits: [num_nodes, out_channels].
            target: classes [num_nodes] int64, or labels [num_nodes, out_channels] in {0, 1}.
        """
        if self.task == "multiclass":
            return F.cross_entropy(logits, target)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))

    def predict(self, logits: Tensor) -> Tensor:
        """Return the class of each node [num_nodes], or its labels [num_nodes, out_channels] as booleans."""
        return logits.argmax(-1) if self.task == "multiclass" else logits > 0

    def _groups(self) -> list[GroupAddRev]:
        return [layer for layer in self.layers if isinstance(layer, GroupAddRev)]

    def _mask(self, x: Tensor) -> Tensor | None:
        """One dropout mask for all layers, scaled; ``None`` where each block draws its own or none is needed."""
        if not (self.shared_dropout and self.training and self.dropout > 0):
            return None
        return dropout_mask(x, self.dropout)


_OF_ROWS = {"embed": RevGNN.embed, "classify": RevGNN.classify}


def _look_at_rows(model: RevGNN, own: nn.Module, x: Tensor, h: Tensor) -> None:
    mask = torch.ones_like(h) if model.training and model.dropout > 0 else None
    for method, rows in (("embed", (x,)), ("classify", (h, mask))):
        try:
            by_rows = goes_by_rows(getattr(model, method), *rows, module=own)
        except ValueError as error:
            raise ValueError(f"{type(model).__name__}.{method}: {error}") from error
        if not by_rows:
            raise ValueError(
                f"{type(model).__name__}.{method} returns rows that depend on other nodes' rows, so that it cannot "
                "be computed part by part: let each row depend on its own, with norms over channels (LayerNorm)"
            )
