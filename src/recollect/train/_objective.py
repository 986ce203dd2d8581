"""What a step makes better: the mean of its losses, or each of many as far as the others allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from recollect.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    Conflict,
    DualProjWeighting,
    FairGradWeighting,
    IMTLGWeighting,
    MeanWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    UPGradWeighting,
    conflict,
)
from recollect.autogram import Engine
from recollect.data import GraphDataset
from recollect.train._errors import UsageError
from recollect.train._settings import ObjectiveSettings

__all__ = ["Objective", "make_objective"]

Weights = Callable[[Tensor], Tensor]  # from a Gramian [m, m] to [m]

_WEIGHTINGS: dict[str, Callable[[], Weights]] = {
    "upgrad": UPGradWeighting,
    "dualproj": DualProjWeighting,
    "mgda": MGDAWeighting,
    "pcgrad": PCGradWeighting,
    "imtlg": IMTLGWeighting,
    "config": ConFIGWeighting,
    "cagrad": lambda: CAGradWeighting(c=0.5),
    "alignedmtl": AlignedMTLWeighting,
    "nashmtl": NashMTLWeighting,
    "fairgrad": FairGradWeighting,
    "mean": MeanWeighting,
}


class Objective(Protocol):
    """From the losses of a step to what goes backward."""

    @property
    def weigh(self) -> Weights | None:
        """From a Gramian to weights, where another part computes it; the step is observed. None: of one objective."""
        ...

    def __call__(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the losses, where it is known already, and the scalar whose gradient is the update."""
        ...

    def observe(self) -> dict[str, float]:
        """Return measures of the steps since the last call."""
        ...


class _Mean:
    """One objective."""

    weigh = None

    def __call__(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        value = losses.mean()
        return value, value

    def observe(self) -> dict[str, float]:
        return {}


class _Many:
    """Objectives that are weighted by what the Gramian of their gradients says.

    Args:
        network: whose parameters count.
        choose: from the losses of a step to the objectives [m].
        weighting: from their Gramian to weights.
        lasting: how many objectives there are, where they are the same in every step: each is then observed.
    """

    def __init__(
        self, network: nn.Module, choose: Callable[[Tensor], Tensor], weighting: Weights, lasting: int = 0
    ) -> None:
        self._engine = Engine(network)
        self._choose = choose
        self._weighting = weighting
        self._lasting = lasting
        self._seen: list[Conflict] = []

    def __call__(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        objectives = self._choose(losses)
        value = losses.mean()
        gramian = self._engine.compute_gramian(objectives)
        # In host memory all that follows waits for nothing more: this is the one wait for the device.
        parts = [gramian.flatten(), objectives.detach().to(gramian.dtype), value.detach().to(gramian.dtype).view(1)]
        together = torch.cat(parts).cpu()
        gramian, known = together[: gramian.numel()].view(gramian.shape), together[gramian.numel() :]
        if not bool(known.isfinite().all()):
            return known[-1], value  # the trainer stops at a loss that is not finite, and names the epoch
        weights = self.weigh(gramian)
        return known[-1], objectives @ weights.to(objectives.device, objectives.dtype, non_blocking=True)

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights [m] of objectives with this Gramian [m, m]; equal ones where it is not finite."""
        if not bool(gramian.isfinite().all()):
            return gramian.new_full(gramian.shape[:1], 1 / len(gramian))  # the trainer stops, as above
        weights = self._weighting(gramian)
        self._seen.append(conflict(gramian, weights))
        return weights

    def observe(self) -> dict[str, float]:
        """Return the measures, NaN without a step.

        ``conflict`` is the share of pairs with opposed gradients; ``cosine`` the least of an update with a gradient,
        ``cosine_mean`` the mean of all, and ``cosine_1``, ``cosine_2``, ... the mean of each lasting objective.
        """
        seen, self._seen = self._seen, []
        if not seen:
            names = ["conflict", "cosine", "cosine_mean", *(f"cosine_{k + 1}" for k in range(self._lasting))]
            return dict.fromkeys(names, math.nan)
        measures = {
            "conflict": statistics.fmean(step.negative_share for step in seen),
            "cosine": min(step.min_cosine for step in seen),
            "cosine_mean": statistics.fmean(float(step.cosines.mean()) for step in seen),
        }
        if self._lasting:
            each = torch.stack([step.cosines for step in seen]).mean(0).tolist()
            measures |= {f"cosine_{k + 1}": value for k, value in enumerate(each)}
        return measures


def make_objective(settings: ObjectiveSettings, graph: GraphDataset, network: nn.Module) -> Objective:
    """Make what the settings ask for.

    Args:
        settings: which objective.
        graph: says whether a node has one class or several labels.
        network: makes the losses; to be called after this.

    Raises:
        UsageError: an objective for each label is asked for where nodes have a class.
    """
    if settings.name == "mean":
        return _Mean()
    weighting = _WEIGHTINGS[settings.weighting]()
    if settings.name == "iwrm":
        return _Many(network, lambda losses: _some_nodes(losses, settings.samples), weighting)
    if graph.task != "multilabel":
        raise UsageError(
            f"objective=multitask has an objective for each label, and the nodes of {graph.name!r} have one class "
            f"each; choose a graph with several labels (ppi, yelp, ogbn-proteins, or sbm with "
            f"dataset.options.num_labels), or objective=iwrm"
        )
    return _Many(network, lambda losses: losses.mean(0), weighting, lasting=graph.num_classes)


def _some_nodes(losses: Tensor, number: int) -> Tensor:
    """Losses of so many nodes at random, or of all if there are no more."""
    each = losses if losses.dim() == 1 else losses.mean(1)
    chosen = torch.randperm(each.numel())[:number].to(each.device, non_blocking=True)
    return each[chosen] if number < each.numel() else each
