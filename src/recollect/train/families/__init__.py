"""The kinds of networks that the loop trains, behind one protocol; see `Family`.

A new kind is a file here, a row in the table below, a class of settings, and a line in the table of
`recollect.train._options`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from recollect.train._graph import TrainingGraph
from recollect.train._settings import RevGNNSettings, Settings
from recollect.train.families._family import Family
from recollect.train.families._histories import HistoriesFamily
from recollect.train.families._own import OwnFamily, own_family
from recollect.train.families._reversible import ReversibleFamily, make_revgnn
from recollect.train.families._reversible_parts import ReversiblePartsFamily
from recollect.train.families._whole_graph import WholeGraphFamily

__all__ = [
    "Family",
    "HistoriesFamily",
    "OwnFamily",
    "ReversibleFamily",
    "ReversiblePartsFamily",
    "WholeGraphFamily",
    "family_of",
    "outline_of",
    "own_family",
]


def _layered(settings: Settings) -> Family:
    family = HistoriesFamily(settings)
    return WholeGraphFamily(settings, family) if settings.training.name == "wholegraph" else family


_REVERSIBLE: dict[str, Callable[[Settings], Family]] = {
    "full": ReversibleFamily,
    "autoscale": ReversiblePartsFamily,
    "wholegraph": lambda settings: WholeGraphFamily(settings, ReversibleFamily(settings)),
}
_FAMILIES: dict[str, Callable[[Settings], Family]] = {
    "reversible": lambda settings: _REVERSIBLE[settings.training.name](settings),
    "histories": _layered,
    "own": own_family,
}


def family_of(settings: Settings) -> Family:
    """The family of the network that the settings ask for."""
    return _FAMILIES[settings.model.family](settings)


def outline_of(settings: Settings, graph: TrainingGraph) -> Callable[[int], nn.Module] | None:
    """What makes the network that the settings ask for in any depth, without histories; None: one's own.

    Args:
        settings: of the run.
        graph: prepared for the network.
    """
    model = settings.model
    if isinstance(model, RevGNNSettings):
        return lambda depth: make_revgnn(model, graph, depth)
    return HistoriesFamily(settings).outline(graph) if model.family == "histories" else None
