"""Networks whose layers take what is outside of a mini-batch from histories: `recollect.autoscale.ScalableGNN`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect import models
from recollect.autoscale import (
    Combination,
    HistoryOptions,
    ScalableGNN,
    SubData,
    history_errors,
    part_weights,
    permute,
    to_adj_t,
)
from recollect.distributed import Shares
from recollect.train._batches import Batches, PartBatches, evaluation_loader, outward_of
from recollect.train._errors import UsageError
from recollect.train._failures import buildable
from recollect.train._graph import ADJACENCY, TrainingGraph, cut
from recollect.train._metrics import known_labels, known_losses
from recollect.train._room import at_depth, check_room, histories_of, shallow_depths
from recollect.train._settings import ScalableSettings, Settings
from recollect.train._team import team
from recollect.train._text import histories_text, per_layer
from recollect.train.families._family import Family

__all__ = ["PLAIN", "HistoriesFamily", "check_inputs"]

PLAIN = 6
"""Arguments of a mini-batch: x, adj_t, batch_size, n_id, offset, count."""
_NETWORKS: dict[str, Callable[..., ScalableGNN]] = {
    "appnp": models.APPNP,
    "gat": models.GAT,
    "gcn": models.GCN,
    "gcn2": models.GCN2,
    "gin": models.GIN,
    "pna": models.PNA,
    "pna_jk": models.PNA_JK,
}


class HistoriesFamily(Family):
    """Networks that take steps on the whole graph or, with histories, on parts of it.

    Args:
        settings: of the run.
        make: makes a network of one's own, of a graph that was prepared; None: one of `recollect.models`.
    """

    def __init__(self, settings: Settings, make: Callable[[TrainingGraph], nn.Module] | None = None) -> None:
        super().__init__(settings)
        self._make = make
        self._named: tuple[str, ...] = ()  # what a network of one's own takes of each edge beside a weight
        self.in_parts = settings.training.name == "autoscale"
        self.by_layers = self.in_parts and settings.training.layerwise
        self._prepared: TrainingGraph | None = None  # before it was placed
        self._team = team()
        self._shares: Shares | None = None  # of the processes, where there are several

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        if self._make is not None:
            network = _with_histories(self._make(graph))
            self._named = network.inputs
            check_inputs(network, self._named, graph.data)
            return network
        if not self.in_parts:
            return self._build(graph, keep_histories=False)
        if self._team.size > 1 and graph.ptr is not None:
            self._shares = Shares(graph.ptr, part_weights(graph.data.adj_t, graph.ptr))
        return self._build(graph, **self._options(graph.data.num_nodes, device))

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Tensor, ...]:
        """Features and adjacency."""
        return graph.data.x, graph.data.adj_t, *(graph.data[name] for name in self._named)

    def modes(self, network: nn.Module) -> list[str]:
        """On parts with histories and on the whole graph, or the latter alone."""
        return ["histories", "whole graph"] if self.in_parts else ["whole graph"]

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """``adj_t`` in the place of ``edge_index``; for training on parts, nodes in the order of the parts."""
        ptr = None
        adjacency = getattr(self.settings.model, "adjacency", "plain")
        kept = self._make is not None and adjacency == "plain"  # a network of one's own may take it
        if "edge_attr" in data and "edge_attr" not in self.names(data) and not kept:
            del data.edge_attr
        data = to_adj_t(data)
        if self.in_parts:
            perm, ptr = cut(self.settings.training, data.adj_t)
            data = permute(data, perm)
        data.adj_t = ADJACENCY[adjacency](data.adj_t)
        return data, ptr

    def names(self, data: Any) -> tuple[str, ...]:
        """What the network takes of a graph by name, beside features and adjacency."""
        return self._named

    def expect(self, graph: TrainingGraph, device: torch.device) -> str | None:
        """Say what the histories will take, and refuse them where there is no room; nothing is allocated."""
        if not self.in_parts or self._make is not None:
            return None
        histories = self.expected_histories(graph, device)
        check_room(histories, device)
        return f"histories: {histories_text(histories)}"

    def expected_histories(self, graph: TrainingGraph, device: torch.device) -> dict[str, Any]:
        """Return what `histories_of` will, of the network that is yet to be made."""
        training = self.settings.training
        dtype, layers = getattr(torch, training.history_dtype), self.settings.model.num_layers or 1
        found = {}
        with buildable(), torch.device("meta"):
            for depth in shallow_depths(layers):
                network = self._build(graph, num_layers=depth, history_dtype=dtype, keep_histories=False)
                found[depth] = histories_of(network, training, device)
        deepest = found[max(found)]
        return deepest | {
            key: at_depth({d: one[key] for d, one in found.items()}, layers) for key in ("layers", "bytes")
        }

    def place(self, graph: TrainingGraph, device: torch.device) -> TrainingGraph:
        """The graph on the device, unless all that is done is done on parts: of several processes, what each needs."""
        outward = outward_of(self.settings.training)
        if self._shares is not None and self.by_layers and outward in (False, "cut"):
            graph = graph.in_part(self._shares, self.names(graph.data), bool(outward))
        self._prepared = graph
        return graph if self.by_layers else super().place(graph, device)

    def batches(self, network: nn.Module, graph: TrainingGraph, device: torch.device, second: bool = False) -> Batches:
        """Some parts in each step, or the whole graph."""
        if self.in_parts and not second:
            placed = self._prepared or graph  # cutting waits for a device
            data = placed.data if placed.own is None else placed.own.data
            return PartBatches(placed, self.settings.training, device, self._shares, self.names(data))
        return super().batches(network, graph, device)

    def call(self, model: Callable[..., Any], inputs: tuple[Any, ...]) -> Tensor:
        """Call it, with the edges to the nodes outside by name, and what its layers take of edges."""
        first = len(inputs) - len(self._named)
        named = dict(zip(self._named, inputs[first:], strict=True))
        if first > PLAIN:
            return self.corrected(model, inputs[:PLAIN], {"outward": inputs[PLAIN], **named})
        return cast(Tensor, model(*inputs[:first], **named))

    def corrected(self, model: Callable[..., Any], inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        """Call it on a mini-batch whose gradients are corrected.

        Raises:
            UsageError: it needs edges that the mini-batch does not have.
        """
        try:
            return cast(Tensor, model(*inputs, **named))
        except NotImplementedError as error:
            raise UsageError(f"training.compensate=complete is needed: {error}") from error

    def begin(self, network: nn.Module, graph: TrainingGraph, epoch: int) -> None:
        """Make all histories those of the parameters, before every so many epochs."""
        every = self.settings.training.refresh_every
        if not self.in_parts or not every or (epoch - 1) % every:
            return
        number = int(known_labels(graph.task, graph.data.y[graph.data.train_mask]))
        loader = evaluation_loader(graph, self.settings.training, self._shares)
        batches = len(loader)  # of each process

        def loss(out: Tensor, sub: SubData) -> Tensor:
            # As in training, where it is the mean over a mini-batch's own labels, or over those of the mini-batches of
            # all processes: these are as many in each step, about.
            rows = sub.data.train_mask[: sub.batch_size].nonzero().flatten().to(out.device)
            target = sub.data.y[: sub.batch_size].to(out.device)
            return known_losses(graph.task, out[rows], target[rows]).sum() * (batches / number)

        _with_histories(network).refresh(loader, loss)

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """On the whole graph, or layer by layer on its parts. All histories are then those of the parameters."""
        if not self.by_layers:
            return super().evaluation(network, graph)
        group, shares = self._team, self._shares
        loader = evaluation_loader(graph, self.settings.training, shares)
        if shares is not None:
            return lambda model: group.gather_rows(cast(Tensor, model(loader=loader)), shares)
        return lambda model: cast(Tensor, model(loader=loader)).to(graph.data.y.device)

    def fill(self, evaluate: Callable[[], Tensor]) -> None:
        """Let the histories be those of the parameters, by one pass over the whole graph."""
        if self.in_parts:
            evaluate()

    def kept(self, network: nn.Module) -> dict[str, Any]:
        """The histories of gradients, if there are any; over processes, this one's."""
        gradients = _with_histories(network).gradients if self.in_parts else None
        return {} if gradients is None else {"gradients": gradients.state()}

    def restore(self, network: nn.Module, kept: dict[str, Any]) -> None:
        """Take them over."""
        gradients = _with_histories(network).gradients if self.in_parts else None
        if gradients is not None and "gradients" in kept:
            gradients.load(kept["gradients"])

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``age_1``, ``age_2``, ... of each layer, and ``error_1``, ... where they are measured in some epochs.

        See `ScalableGNN.staleness` and `recollect.autoscale.history_errors`; errors are NaN in the other epochs.
        """
        if not self.in_parts:
            return {}
        network, training = _with_histories(network), self.settings.training
        seen = {f"age_{layer}": age for layer, age in enumerate(network.staleness(), 1)}
        if training.errors_every:
            found = [float("nan")] * len(seen)
            if errors:
                loader = evaluation_loader(graph, training, self._shares) if self.by_layers else graph.data
                found = history_errors(network, loader)
            seen |= {f"error_{layer}": error for layer, error in enumerate(found, 1)}
        return seen

    def summarize(
        self, network: nn.Module, history: Sequence[dict[str, float]], device: torch.device
    ) -> dict[str, Any]:
        """Size of the histories; mean ages after the last epoch, and errors where they were last measured."""
        if not self.in_parts:
            return {}
        errors = [found for row in history if (found := per_layer(row, "error")) and found[0] == found[0]]
        size = histories_of(_with_histories(network), self.settings.training, device)
        last = {"ages": per_layer(history[-1], "age"), "errors": errors[-1] if errors else []}
        return {"histories": size | last}

    def plain_bytes(self, network: nn.Module, graph: TrainingGraph, batches: Batches, peak: int) -> tuple[int, int]:
        """At most as the parts are to all parts, and about as their nodes and halo are to all nodes."""
        training = self.settings.training
        rows = max(batch.inputs[0].size(0) for batch in batches)
        return peak * training.num_parts // training.parts_per_batch, peak * graph.data.num_nodes // rows

    def size(self, num_nodes: int) -> tuple[int, int]:
        """By the channels and layers of the settings."""
        own = self.settings.model
        features = num_nodes * (own.hidden_channels or 0)
        return features, features * (own.num_layers or 0)

    def outline(self, graph: TrainingGraph) -> Callable[[int], nn.Module]:
        """What makes the network with another number of layers, without histories."""
        return lambda depth: self._build(graph, num_layers=depth, keep_histories=False)

    def _build(self, graph: TrainingGraph, num_layers: int | None = None, **histories: Any) -> ScalableGNN:
        own = cast(ScalableSettings, self.settings.model)
        options = dict(own.options)
        if own.kind in ("pna", "pna_jk"):
            options["deg"] = graph.data.adj_t.crow_indices().diff()
        return _NETWORKS[own.kind](
            num_nodes=graph.data.num_nodes,
            in_channels=graph.data.x.size(-1),
            hidden_channels=own.hidden_channels,
            out_channels=graph.num_classes,
            num_layers=own.num_layers if num_layers is None else num_layers,
            dropout=own.dropout,
            **options,
            **histories,
        )

    def _options(self, num_nodes: int, device: torch.device) -> dict[str, Any]:
        training = self.settings.training
        path = training.history_path
        return {
            "pool_size": training.pool_size,
            "buffer_size": min(training.buffer_size or num_nodes, num_nodes) if training.pool_size else None,
            "device": None if path else training.history_device or device,
            "history_dtype": getattr(torch, training.history_dtype),
            "history_path": Path(path).expanduser() if path else None,
            "compensate": training.compensate is not None,
            "combine": None if training.combine is None else Combination(training.combine, training.combine_score),  # type: ignore[arg-type]
            "histories": HistoryOptions(process_group=self._shares),
        }


def check_inputs(network: nn.Module, names: Sequence[str], data: Any) -> None:
    """Check that a graph has what a network takes of it.

    Args:
        network: for the message.
        names: of what it takes.
        data: the graph.

    Raises:
        UsageError: something is missing.
    """
    if missing := [name for name in names if name not in data]:
        raise UsageError(
            f"the layers of the {type(network).__name__} need {', '.join(missing)}, and the graph as it was prepared "
            "has none: give it edge_attr [num_edges, D], and leave the adjacency plain: edges that are added have no "
            "attributes"
        )


def _with_histories(network: nn.Module) -> ScalableGNN:
    if not isinstance(network, ScalableGNN):
        raise UsageError(
            f"training=autoscale needs a model with histories, a recollect.autoscale.ScalableGNN, and this is a "
            f"{type(network).__name__}: write its layers in forward_layer, or choose training=full"
        )
    return network
