"""Deep reversible networks in steps over the whole graph, part by part: `recollect.outofcore.WholeGraph`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect import models
from recollect.autoscale import HistoryFileError, edge_index_of, permute, to_adj_t
from recollect.distributed import Shares
from recollect.outofcore import WholeGraph
from recollect.train._errors import TrainingError, UsageError
from recollect.train._graph import TrainingGraph, cut
from recollect.train._metrics import known_labels, known_losses
from recollect.train._objective import Objective
from recollect.train._settings import Settings
from recollect.train._team import team
from recollect.train._text import tables_text
from recollect.train.families._reversible import ReversibleFamily, drift_of, edge_inputs

__all__ = ["WholeGraphFamily"]


class WholeGraphFamily(ReversibleFamily):
    """Networks whose activations and gradients lie in tables, of which a part is computed at a time."""

    any_depth = False  # there is one store
    draws_alike = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._whole: WholeGraph | None = None
        self._shares: Shares | None = None  # of the processes, where there are several

    def modes(self, network: nn.Module) -> list[str]:
        """Part by part, and the whole graph at once with every activation kept."""
        return ["part by part", "everything kept"]

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift``, the largest relative reconstruction error; NaN if nothing was reconstructed."""
        return drift_of(None if self._whole is None else self._whole.last_drift)

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """Nodes in the order of the parts."""
        data = to_adj_t(data)
        perm, ptr = cut(self.settings.training, data.adj_t)
        data = permute(data, perm)
        data.edge_index = edge_index_of(data.adj_t)
        del data.adj_t
        return data, ptr

    def expect(self, graph: TrainingGraph, device: torch.device) -> str | None:
        """Say what the tables will take."""
        assert graph.ptr is not None  # as _edges returned it
        return f"tables: {tables_text(self._tables(graph.ptr.diff().tolist(), graph.num_classes))}"

    def own_step(self, network: nn.Module, graph: TrainingGraph, objective: Objective) -> Callable[[], Tensor] | None:
        """A step over all parts, of one objective or of one for each label."""
        mask, whole = graph.data.train_mask, self._of_parts(network, graph)
        scale = 1 / known_labels(graph.task, graph.data.y[mask]).clamp(min=1)

        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            return known_losses(graph.task, logits, target).sum() * scale

        def of_each_label(logits: Tensor, target: Tensor) -> Tensor:
            return known_losses(graph.task, logits, target).sum(0) * (scale * graph.num_classes)

        if objective.weigh is None:
            return lambda: whole.step(criterion)
        return lambda: whole.step(of_each_label, objective.weigh).mean()

    def summarize(
        self, network: nn.Module, history: Sequence[dict[str, float]], device: torch.device
    ) -> dict[str, Any]:
        """What the tables take; of several processes, those of this one."""
        assert self._whole is not None
        sizes = [stop - start for start, stop in self._whole.parts.bounds]
        return {"tables": self._tables(sizes, cast(models.RevGNN, network).head.out_features)}

    def _tables(self, sizes: Sequence[int], num_classes: int) -> dict[str, Any]:
        """Return what tables hold for each node: activations and a gradient, and one for each of several objectives."""
        store, channels = self.settings.training.store, self.own.hidden_channels
        several = 0 if self.settings.objective.name == "mean" else num_classes * channels
        numbers, rows = 2 * channels + several, sum(sizes)
        spare = 2 * channels * max(sizes) if store else 0  # in files, with the rows of the largest part once more
        return {"rows": rows, "numbers": numbers, "bytes": 4 * (rows * numbers + spare), "place": store or "memory"}

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """Part by part too."""
        whole, shares, group = self._of_parts(network, graph), self._shares, team()
        if shares is not None:
            return lambda model: group.gather_rows(whole.evaluate(), shares)
        return lambda model: whole.evaluate()

    def _of_parts(self, network: nn.Module, graph: TrainingGraph) -> WholeGraph:
        if self._whole is None or self._whole.model is not network:
            if graph.ptr is None:
                raise ValueError("the graph is not cut into parts: prepare it for training=wholegraph")
            inputs = edge_inputs(self.own, graph.data)
            self._whole = None  # gives its files up
            store, ptr = self.settings.training.store, graph.ptr
            if team().size > 1:
                self._shares = Shares(ptr, torch.ones(ptr.numel() - 1))  # as many parts for each
            try:
                self._whole = WholeGraph(
                    cast(models.RevGNN, network), graph.data, ptr, store, inputs=inputs, shares=self._shares
                )
            except (OSError, HistoryFileError) as error:
                raise TrainingError(str(error)) from error
            except ValueError as error:
                raise UsageError(f"training=wholegraph: {error}") from error
        return self._whole
