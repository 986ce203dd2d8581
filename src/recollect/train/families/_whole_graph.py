"""Any network in steps over the whole graph, part by part: `recollect.outofcore.WholeGraph`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale import HistoryFileError, ScalableGNN, permute, to_adj_t
from recollect.distributed import Shares
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph
from recollect.train._batches import Batches
from recollect.train._errors import TrainingError, UsageError
from recollect.train._graph import TrainingGraph, cut
from recollect.train._metrics import known_labels, known_losses
from recollect.train._objective import Objective
from recollect.train._settings import Settings
from recollect.train._team import team
from recollect.train._text import tables_text
from recollect.train.families._family import Family
from recollect.train.families._reversible import SAVED, drift_of

__all__ = ["WholeGraphFamily"]


class WholeGraphFamily(Family):
    """Networks whose activations and gradients lie in tables, of which a part is computed at a time.

    Args:
        settings: of the run.
        of: the family that makes the network, and calls it on the whole graph at once.
    """

    draws_alike = True

    def __init__(self, settings: Settings, of: Family) -> None:
        super().__init__(settings)
        self._of = of
        self._whole: WholeGraph | None = None  # there is one store
        self._shares: Shares | None = None  # of the processes, where there are several

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        network = self._of._network(graph, device, num_layers)
        if not isinstance(network, ScalableGNN):
            raise UsageError(
                "training=wholegraph needs a model whose layers can be computed one by one, a recollect.models.RevGNN "
                f"or another recollect.autoscale.ScalableGNN, and this is a {type(network).__name__}: write its layers "
                "in forward_layer, or choose training=full"
            )
        return network

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Any, ...]:
        """Those of the whole graph at once."""
        return self._of.inputs(network, graph)

    def call(self, model: Callable[..., Any], inputs: tuple[Any, ...]) -> Tensor:
        """Return the logits of the whole graph at once."""
        return self._of.call(model, inputs)

    def modes(self, network: nn.Module) -> list[str]:
        """Part by part; and the whole graph at once, of a reversible network with every activation kept."""
        return ["part by part", self._of.modes(network)[-1]]

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation, or recollect them."""
        self._of.switch(network, second)

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """Nodes in the order of the parts."""
        data = to_adj_t(data)
        perm, ptr = cut(self.settings.training, data.adj_t)
        return self._of._edges(permute(data, perm))[0], ptr

    def expect(self, graph: TrainingGraph, device: torch.device) -> str | None:
        """Say what the tables will take, where the settings tell it."""
        known, store = self._of.tables(graph.num_classes), self.settings.training.store
        if known is None:
            return None
        assert graph.ptr is not None  # as _edges returned it
        (numbers, masks), sizes = known, graph.ptr.diff().tolist()
        channels, rows = self.settings.model.hidden_channels or 0, sum(sizes)
        spare = 2 * channels * max(sizes) if store else 0  # in files, with the rows of the largest part once more
        return f"tables: {tables_text(_described(rows, numbers, 4 * (rows * numbers + spare) + masks * rows, store))}"

    def place(self, graph: TrainingGraph, device: torch.device) -> TrainingGraph:
        """The graph on the host, whose parts go to the device."""
        return graph

    def batches(self, network: nn.Module, graph: TrainingGraph, device: torch.device, second: bool = False) -> Batches:
        """The whole graph at once, on the device in the second mode alone."""
        return super().batches(network, graph, device if second else torch.device("cpu"), second)

    def rehearse(self, evaluate: Callable[[], Tensor]) -> None:
        """Evaluate once, and look whether steps can be taken in training mode too."""
        self._of.rehearse(evaluate)
        assert self._whole is not None
        self._whole.model.train()
        with _explained():
            self._whole.check()

    def own_step(self, network: nn.Module, graph: TrainingGraph, objective: Objective) -> Callable[[], Tensor] | None:
        """A step over all parts, of one objective or of one for each label."""
        mask, whole = graph.data.train_mask, self._of_parts(network, graph)
        scale = 1 / known_labels(graph.task, graph.data.y[mask]).clamp(min=1)

        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            return known_losses(graph.task, logits, target).sum() * scale

        def of_each_label(logits: Tensor, target: Tensor) -> Tensor:
            return known_losses(graph.task, logits, target).sum(0) * (scale * graph.num_classes)

        weigh = objective.weigh
        if weigh is None:
            return lambda: whole.step(criterion)

        def weights(gramian: Tensor) -> Tensor:
            """In host memory, where the measures of an objective wait for nothing more."""
            return weigh(gramian.cpu()).to(gramian.device, gramian.dtype, non_blocking=True)

        return lambda: whole.step(of_each_label, weights).mean()

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift`` of a reversible network, the largest relative reconstruction error."""
        if self._whole is None or "drift" not in self._of.observe(network, graph, errors):
            return {}
        return drift_of(self._whole.last_drift)

    def summarize(
        self, network: nn.Module, history: Sequence[dict[str, float]], device: torch.device
    ) -> dict[str, Any]:
        """What the tables take; of several processes, those of this one."""
        assert self._whole is not None
        own = sum(stop - start for start, stop in self._whole.parts.bounds)
        tables = self._whole.tables.values()
        numbers = sum(width for _, width, dtype in tables if dtype.is_floating_point)
        total = sum(rows * width * dtype.itemsize for rows, width, dtype in tables)
        return {"tables": _described(own, numbers, total, self.settings.training.store)}

    def plain_bytes(self, network: nn.Module, graph: TrainingGraph, batches: Batches, peak: int) -> tuple[int, int]:
        """About what layers save of each channel on the whole graph."""
        assert self._whole is not None
        if isinstance(network, RevGNN):
            numbers = network.project.out_features * network.num_layers
        else:
            numbers = sum(width for _, width, _ in self._whole.tables.values())  # one has each layer's input
        expected = peak + 4 * SAVED * self._whole.num_nodes * numbers
        return expected, expected

    def size(self, num_nodes: int) -> tuple[int, int]:
        """By the settings, if they say it."""
        return self._of.size(num_nodes)

    def evaluation(self, network: nn.Module, graph: TrainingGraph) -> Callable[[Callable[..., Any]], Tensor]:
        """Part by part too."""
        whole, shares, group = self._of_parts(network, graph), self._shares, team()

        def evaluate(model: Callable[..., Any]) -> Tensor:
            out = whole.evaluate()
            return self._of.checked(out if shares is None else group.gather_rows(out, shares), graph)

        return evaluate

    def _of_parts(self, network: nn.Module, graph: TrainingGraph) -> WholeGraph:
        if self._whole is None or self._whole.model is not network:
            if graph.ptr is None:
                raise ValueError("the graph is not cut into parts: prepare it for training=wholegraph")
            self._whole = None  # gives its files up
            data, inputs = self._of.of_parts(network, graph.data)
            if team().size > 1:
                self._shares = Shares(graph.ptr, torch.ones(graph.ptr.numel() - 1))  # as many parts for each
            with _explained():
                assert isinstance(network, ScalableGNN)
                self._whole = WholeGraph(
                    network, data, graph.ptr, self.settings.training.store, inputs=inputs, shares=self._shares
                )
        return self._whole


@contextmanager
def _explained() -> Iterator[None]:
    """Say of errors of a `WholeGraph` what they are of."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"training.store: a file cannot be made or read: {error}") from error
    except HistoryFileError as error:
        raise TrainingError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"training=wholegraph: {error}") from error


def _described(rows: int, numbers: int, nbytes: int, store: str | None) -> dict[str, Any]:
    return {"rows": rows, "numbers": numbers, "bytes": nbytes, "place": store or "memory"}
