"""Deep reversible networks: `recollect.models.RevGNN`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect import models
from recollect.autoscale import HistoryFileError, edge_index_of, permute, to_adj_t
from recollect.outofcore import WholeGraph
from recollect.train._errors import TrainingError, UsageError
from recollect.train._graph import TrainingGraph, cut
from recollect.train._metrics import losses
from recollect.train._settings import RevGNNSettings, Settings
from recollect.train.families._family import Family

__all__ = ["ReversibleFamily"]

_EDGE_CONVS = ("gat", "gen")


class ReversibleFamily(Family):
    """Networks that keep the output of their last layer, in any depth."""

    any_depth = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.own = cast(RevGNNSettings, settings.model)
        self.part_by_part = settings.training.name == "wholegraph"
        if self.part_by_part:
            self.any_depth = False  # there is one store
        self._whole: WholeGraph | None = None

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Tensor, ...]:
        """Features, edges and, where they are wanted and there, edge features."""
        found = (graph.data.x, graph.data.edge_index)
        return (*found, graph.data.edge_attr) if self._has_edge_features(graph) else found

    def modes(self, network: nn.Module) -> list[str]:
        """Reversible, and with every activation kept."""
        return ["part by part" if self.part_by_part else "reversible", "everything kept"]

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation, or recollect them."""
        cast(models.RevGNN, network).disable = second

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift``, the largest relative reconstruction error; NaN if nothing was reconstructed."""
        drift = cast(models.RevGNN, network).last_drift if self._whole is None else self._whole.last_drift
        return {"drift": float("nan") if drift is None else drift}

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """Part by part, nodes in the order of the parts."""
        if not self.part_by_part:
            return super()._edges(data)
        data = to_adj_t(data)
        perm, ptr = cut(self.settings.training, data.adj_t)
        data = permute(data, perm)
        data.edge_index = edge_index_of(data.adj_t)
        del data.adj_t
        return data, ptr

    def expect(self, graph: TrainingGraph, device: torch.device) -> str | None:
        """Say what the tables will take."""
        if not self.part_by_part:
            return None
        store, number = self.settings.training.store, graph.data.num_nodes * self.own.hidden_channels
        return f"tables: {2 * 4 * number / 2**20:,.1f} MiB in {store or 'memory'}"

    def own_step(self, network: nn.Module, graph: TrainingGraph) -> Callable[[], Tensor] | None:
        """A step over all parts."""
        if not self.part_by_part:
            return None
        number = int(graph.data.train_mask.sum())
        whole = self._of_parts(network, graph)

        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            return losses(graph.task, logits, target).sum() / number

        return lambda: whole.step(criterion)

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """Part by part too."""
        if not self.part_by_part:
            return super().evaluation(network, graph)
        whole = self._of_parts(network, graph)
        return lambda model: whole.evaluate()

    def _of_parts(self, network: nn.Module, graph: TrainingGraph) -> WholeGraph:
        if self._whole is None or self._whole.model is not network:
            if graph.ptr is None:
                raise ValueError("the graph is not cut into parts: prepare it for training=wholegraph")
            inputs = ("edge_attr",) if self._has_edge_features(graph) else ()
            self._whole = None  # gives its files up
            store = self.settings.training.store
            try:
                self._whole = WholeGraph(cast(models.RevGNN, network), graph.data, graph.ptr, store, inputs=inputs)
            except (OSError, HistoryFileError) as error:
                raise TrainingError(str(error)) from error
            except ValueError as error:
                raise UsageError(f"training=wholegraph: {error}") from error
        return self._whole

    def size(self, num_nodes: int) -> tuple[int, int]:
        """Those of one group, which is what is computed at a time, and those of all layers."""
        features = num_nodes * self.own.hidden_channels
        return features // self.own.num_groups, features * self.own.num_layers

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        own = self.own
        options = dict(own.conv_kwargs)
        if self._has_edge_features(graph):
            options.setdefault("edge_dim", graph.data.edge_attr.size(-1))
        make: Callable[..., models.RevGNN] = models.RevGNN
        return make(
            graph.data.x.size(-1),
            own.hidden_channels,
            graph.num_classes,
            own.num_layers if num_layers is None else num_layers,
            own.num_groups,
            own.conv,
            own.dropout,
            norm=own.norm,
            shared_dropout=own.shared_dropout,
            tied=own.tied,
            task=graph.task,
            anchor_every=own.anchor_every,
            disable=own.disable,
            exact=own.exact,
            conv_kwargs=options,
        )

    def _has_edge_features(self, graph: TrainingGraph) -> bool:
        if not self.own.edge_features or graph.data.get("edge_attr") is None:
            return False
        if self.own.conv not in _EDGE_CONVS:
            raise UsageError(
                f"model.edge_features=true needs a convolution that takes edge features ({', '.join(_EDGE_CONVS)}), "
                f"and model.conv is {self.own.conv}"
            )
        return True
