"""The training steps of an epoch and one evaluation, through Fabric."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from recollect.budget import Row
from recollect.train._batches import FullBatch, PartBatches
from recollect.train._budget import Planned, make_plan
from recollect.train._build import build_optimizer
from recollect.train._errors import UsageError
from recollect.train._graph import TrainingGraph
from recollect.train._metrics import losses, scored
from recollect.train._objective import make_objective
from recollect.train._team import team
from recollect.train.families import Family

__all__ = ["Step"]


class Step:
    """A model, its optimizer and its graph.

    Args:
        fabric: gives device and precision.
        family: of the network; with the settings of the optimizer, the mini-batches, and the largest gradient norm.
        graph: prepared for the network; it comes to the device unless all that is done is done on parts.
        network: the model; it comes to the device.
    """

    def __init__(self, fabric: Fabric, family: Family, graph: TrainingGraph, network: nn.Module) -> None:
        settings = family.settings
        self.fabric = fabric
        self.family = family
        self.network = network.to(fabric.device)  # before the optimizer: some devices get new parameters
        self.clip_norm = settings.clip_norm
        self.lipschitz = settings.training.lipschitz
        self.graph = family.place(graph, fabric.device)
        self.rows = {part: self.graph.data[f"{part}_mask"].nonzero().flatten() for part in ("train", "val", "test")}
        self.own = family.batches(network, self.graph, fabric.device)
        self.batches = self.own
        self.objective = make_objective(settings.objective, graph, network)
        self.model, self.optimizer = fabric.setup(network, build_optimizer(settings.optimizer, network))
        self._team = team()
        self._own_step = family.own_step(network, self.graph, self.objective)
        self._second = False
        self.plan: Planned | None = None
        self._evaluation = family.evaluation(network, self.graph)

    @property
    def modes(self) -> list[str]:
        """What the steps are called, and what those that they are compared with, if there is a comparison."""
        return self.family.modes(self.network) if self.plan is None else ["within the budget", "everything kept"]

    def keep_within(self, budget: str, rows: Iterable[Row] = ()) -> Planned:
        """Plan what is kept of each layer so that a step stays within a budget, and apply the plan.

        Args:
            budget: as in the settings.
            rows: of the plan that the run had before.

        Raises:
            UsageError: the network has no units, or there are mini-batches.
            TrainingError: the budget cannot be met.
        """
        if not isinstance(self.own, FullBatch):
            raise UsageError(f"memory_budget={budget} needs training=full")
        inputs, target, chosen = self.own.largest()

        def loss(*given: Any) -> Tensor:
            # As Fabric's own module does, which would refuse a backward pass that does not go through Fabric.
            with self.fabric.autocast():
                logits = self.family.call(self.network, given)
            return self._loss(self.fabric.strategy.precision.convert_output(logits), target, chosen)[1]

        self.model.train()
        self.plan = make_plan(self.network, loss, inputs, budget, rows)
        self.plan.switch(on=True)
        return self.plan

    def switch(self, second: bool) -> None:
        """Take further steps in the second of the modes, or in the first."""
        self._second = second
        self.family.switch(self.network, second)
        if self.plan is not None:  # after the family: a plan is applied to what the modules are set to
            self.plan.switch(on=not second)
        device = self.fabric.device
        self.batches = self.family.batches(self.network, self.graph, device, second=True) if second else self.own

    def plain_bytes(self, peak: int) -> tuple[int, int]:
        """Bytes of a step in the second mode, which was not measured yet: at most, and about.

        Args:
            peak: bytes of a step in the first mode.
        """
        if self.plan is not None:
            return self.plan.plain_bytes, self.plan.plain_bytes
        return self.family.plain_bytes(self.network, self.graph, self.own, peak)

    def train(self) -> float:
        """Take the steps of an epoch; return the mean of their losses, by training nodes."""
        self.model.train()
        if self._own_step is not None and not self._second:
            self.optimizer.zero_grad(set_to_none=False)
            loss = self._own_step()
            self._update()
            return float(loss)
        # Of one process on the host, where a number meets tensors of any device.
        place = self.fabric.device if self._team.size > 1 else "cpu"
        total, nodes = torch.zeros((), dtype=torch.float64, device=place), 0
        for inputs, target, rows in self.batches:
            # In place: gradients then belong to what is always there, as in the measurements. A budget is for both
            # gradients and activations, and the former grow while the latter go.
            self.optimizer.zero_grad(set_to_none=self.plan is not None)
            if self._team.size > 1:
                found = losses(self.graph.task, self.family.call(self.model, inputs)[rows], target[rows])
                total, nodes = total + self._together(found), nodes + len(rows)
                continue
            # The logits have no name here: backward does without them.
            value, update = self._loss(self.family.call(self.model, inputs), target, rows)
            self.fabric.backward(update)
            self._update()
            total, nodes = total + len(rows) * value.detach().double(), nodes + len(rows)
        if self._team.size > 1:
            total, nodes = self._team.add_up(total), int(self._team.add_up(nodes))
        return float(total) / nodes  # the one wait for the device, unless objectives have waited for their Gramian

    def _loss(self, logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value of a batch's loss, and what goes backward."""
        value, update = self.objective(losses(self.graph.task, logits[rows], target[rows]))
        if self.lipschitz:
            extra = self.lipschitz * self.network.lipschitz_loss()  # type: ignore[operator]
            value, update = value + extra, update + extra
        return value, update

    def _together(self, found: Tensor) -> Tensor:
        """Take the step of the mean loss over the nodes of all processes; return the sum of this one's losses."""
        value, number = found.sum(), self._team.add_up(found.numel())
        self.fabric.backward(value / number.clamp_min(1).to(value.dtype))
        self._team.add_gradients(self.network.parameters())
        if number:
            self._update()
        return value.detach()

    def _update(self) -> None:
        if self.clip_norm is not None:
            # A gradient that is not finite shows in the evaluation, which names the epoch.
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()

    def evaluate(self) -> Tensor:
        """Return the logits [num_nodes, num_classes] in evaluation mode, where the graph's labels are.

        Histories, if there are any, are then those of the parameters.
        """
        self.model.eval()
        with torch.no_grad():
            return self._evaluation(self.model)

    def fill(self) -> None:
        """Bring what steps read, beside the parameters, to the state of the parameters."""
        self.family.fill(self.evaluate)

    def kept(self) -> dict[str, Any]:
        """Return what steps read and cannot compute of the parameters; of several processes, this one's."""
        order = self.own.order if isinstance(self.own, PartBatches) else None
        return self.family.kept(self.network) | ({} if order is None else {"order": order.drawn})

    def restore(self, kept: dict[str, Any]) -> None:
        """Take over what :meth:`kept` returned; what is missing begins anew.

        Raises:
            ValueError: it is of another network or graph.
        """
        self.family.restore(self.network, kept)
        if isinstance(self.own, PartBatches) and self.own.order is not None and "order" in kept:
            self.own.order.drawn = kept["order"]

    def begin(self, epoch: int) -> None:
        """Do what is due before an epoch, which is numbered from 1."""
        self.family.begin(self.network, self.graph, epoch)

    def observe(self, errors: bool) -> dict[str, float]:
        """Return what the last training steps left to be seen: by the network's family, and by the objective.

        Args:
            errors: whether what costs a pass over the graph is wanted too.
        """
        return {**self.family.observe(self.network, self.graph, errors), **self.objective.observe()}

    def loss(self, logits: Tensor, part: str) -> Tensor:
        """The loss, a scalar, on the nodes of a part of the split."""
        rows = self.rows[part]
        return losses(self.graph.task, logits[rows], self.graph.data.y[rows]).mean()

    def score(self, logits: Tensor, part: str) -> Tensor:
        """The graph's metric, a scalar, on the nodes of a part of the split; see `recollect.train._metrics.score`."""
        return scored(self.graph, logits, self.rows[part], part)
