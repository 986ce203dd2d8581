"""The training steps of an epoch and one evaluation, through Fabric."""

from __future__ import annotations

from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from recollect.autoscale import ScalableGNN, history_errors
from recollect.models import RevGNN
from recollect.train._batches import Batches, FullBatch, PartBatches, evaluation_loader
from recollect.train._build import build_optimizer
from recollect.train._graph import TrainingGraph, to_device
from recollect.train._metrics import losses, scored
from recollect.train._network import graph_inputs
from recollect.train._objective import make_objective
from recollect.train._settings import Settings

__all__ = ["Step"]


class Step:
    """A model, its optimizer and its graph.

    Args:
        fabric: gives device and precision.
        settings: of the optimizer, the mini-batches, and the largest norm of the gradient.
        graph: prepared for the model; it comes to the device unless all that is done is done on parts.
        network: the model; it comes to the device.
    """

    def __init__(self, fabric: Fabric, settings: Settings, graph: TrainingGraph, network: nn.Module) -> None:
        training = settings.training
        self.fabric = fabric
        self.network = network.to(fabric.device)  # before the optimizer: some devices get new parameters
        self.clip_norm = settings.clip_norm
        self.lipschitz = training.lipschitz
        self.errors_every = training.errors_every
        self.in_parts = training.name == "autoscale"
        self.loader = evaluation_loader(graph, training) if self.in_parts and training.layerwise else None
        self.graph = graph if self.loader is not None else to_device(graph, fabric.device)
        self.rows = {part: self.graph.data[f"{part}_mask"].nonzero().flatten() for part in ("train", "val", "test")}
        self.inputs = graph_inputs(settings.model, self.graph)
        self.edge_dropout = training.edge_dropout
        self.own: Batches = PartBatches(graph, training, fabric.device) if self.in_parts else self._whole()
        self.batches: Batches = self.own
        self.objective = make_objective(settings.objective, graph, network)
        self.model, self.optimizer = fabric.setup(network, build_optimizer(settings.optimizer, network))

    @property
    def modes(self) -> list[str]:
        """What the steps are called, and what those that they are compared with, if there is a comparison."""
        if isinstance(self.network, RevGNN):
            return ["reversible", "everything kept"]
        return ["histories", "whole graph"] if self.in_parts else ["whole graph"]

    def switch(self, second: bool) -> None:
        """Take further steps in the second of the modes, or in the first."""
        if isinstance(self.network, RevGNN):
            self.network.disable = second
        elif self.in_parts:
            self.batches = self._whole() if second else self.own

    def train(self) -> float:
        """Take the steps of an epoch; return the mean of their losses, by training nodes."""
        self.model.train()
        total, nodes = torch.zeros((), dtype=torch.float64, device=self.fabric.device), 0
        for inputs, target, rows in self.batches:
            # In place: gradients then belong to what is always there, as in the measurements.
            self.optimizer.zero_grad(set_to_none=False)
            value, update = self.objective(losses(self.graph.task, self.model(*inputs)[rows], target[rows]))
            if self.lipschitz:
                extra = self.lipschitz * self.network.lipschitz_loss()  # type: ignore[operator]
                value, update = value + extra, update + extra
            self.fabric.backward(update)
            if self.clip_norm is not None:
                # A gradient that is not finite shows in the evaluation, which names the epoch.
                self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False
                )
            self.optimizer.step()
            total, nodes = total + len(rows) * value.detach(), nodes + len(rows)
        return float(total) / nodes  # the one wait for the device

    def evaluate(self) -> Tensor:
        """Return the logits [num_nodes, num_classes] in evaluation mode, where the graph's labels are.

        All histories are then those of the parameters.
        """
        self.model.eval()
        with torch.no_grad():
            if self.loader is None:
                return cast(Tensor, self.model(*self.inputs))
            return cast(Tensor, self.model(loader=self.loader)).to(self.graph.data.y.device)

    def fill(self) -> None:
        """Let the histories, if there are any, be those of the parameters, by one pass over the whole graph."""
        if self.in_parts:
            self.evaluate()

    def observe(self, errors: bool) -> dict[str, float]:
        """Return what the last training steps left to be seen.

        Of a reversible model: ``drift``, the largest relative reconstruction error (NaN if nothing was reconstructed).
        Of one with histories: ``age_1``, ``age_2``, ... for each layer, see :meth:`ScalableGNN.staleness`, and, if
        they are asked for, ``error_1``, ... (else NaN), see `recollect.autoscale.history_errors`. With many objectives
        also what `Objective.observe` returns.
        """
        return {**self._observe_network(errors), **self.objective.observe()}

    def _observe_network(self, errors: bool) -> dict[str, float]:
        if isinstance(self.network, RevGNN):
            drift = self.network.last_drift
            return {"drift": float("nan") if drift is None else drift}
        if not isinstance(self.network, ScalableGNN) or not self.in_parts:
            return {}
        seen = {f"age_{layer}": age for layer, age in enumerate(self.network.staleness(), 1)}
        if self.errors_every:
            found = (
                history_errors(self.network, self.graph.data if self.loader is None else self.loader)
                if errors
                else [float("nan")] * len(seen)
            )
            seen |= {f"error_{layer}": error for layer, error in enumerate(found, 1)}
        return seen

    def loss(self, logits: Tensor, part: str) -> Tensor:
        """The loss, a scalar, on the nodes of a part of the split."""
        rows = self.rows[part]
        return losses(self.graph.task, logits[rows], self.graph.data.y[rows]).mean()

    def score(self, logits: Tensor, part: str) -> Tensor:
        """The graph's metric, a scalar, on the nodes of a part of the split; see `recollect.train._metrics.score`."""
        return scored(self.graph, logits, self.rows[part], part)

    def _whole(self) -> FullBatch:
        inputs = tuple(tensor.to(self.fabric.device) for tensor in self.inputs)
        return FullBatch(to_device(self.graph, self.fabric.device), inputs, self.edge_dropout)
