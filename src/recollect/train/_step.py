"""One training step and one evaluation, through Fabric."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from recollect.data import GraphDataset
from recollect.models import RevGNN
from recollect.train._build import build_optimizer, graph_inputs
from recollect.train._settings import Settings

__all__ = ["Step", "to_device"]


def to_device(fabric: Fabric, graph: GraphDataset) -> GraphDataset:
    """The graph on Fabric's device."""
    return replace(graph, data=graph.data.to(fabric.device))


class Step:
    """A model, its optimizer and its graph.

    Args:
        fabric: gives device and precision.
        settings: of the optimizer, and the largest norm of the gradient.
        graph: on the device.
        network: the model; Fabric moves it to the device.
    """

    def __init__(self, fabric: Fabric, settings: Settings, graph: GraphDataset, network: RevGNN) -> None:
        self.fabric = fabric
        self.network = network
        self.graph = graph
        self.clip_norm = settings.clip_norm
        self.inputs = graph_inputs(settings.model, graph)
        self.model, self.optimizer = fabric.setup(network, build_optimizer(settings.optimizer, network))

    def train(self) -> tuple[float, float]:
        """Take one step on the whole graph; return its loss and its drift.

        Returns:
            The loss, and the largest relative reconstruction error (NaN if nothing was reconstructed).
        """
        self.model.train()
        # In place: gradients then belong to what is always there, as in the measurements.
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.loss(self.model(*self.inputs), "train")
        self.fabric.backward(loss)
        if self.clip_norm is not None:
            # A gradient that is not finite shows in the evaluation, which names the epoch.
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        drift = self.network.last_drift
        return float(loss.detach()), float("nan") if drift is None else drift

    def evaluate(self) -> Tensor:
        """Return the logits [num_nodes, num_classes] in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return cast(Tensor, self.model(*self.inputs))

    def loss(self, logits: Tensor, part: str) -> Tensor:
        """The loss, a scalar, on the nodes of a part of the split."""
        mask = self.graph.data[f"{part}_mask"]
        return self.network.loss(logits[mask], self.graph.data.y[mask])
