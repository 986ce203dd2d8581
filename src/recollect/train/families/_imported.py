"""The network that ``model.target`` names."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from recollect.train._errors import TrainingError, UsageError, choose_from
from recollect.train._graph import TrainingGraph
from recollect.train._settings import ImportSettings

__all__ = ["imported"]

_FORM = "write MODULE:NAME, such as my_module:make or torch_geometric.nn:GraphSAGE"


def imported(own: ImportSettings, graph: TrainingGraph) -> nn.Module:
    """Call what ``model.target`` names with what it names of the graph's sizes and of the settings.

    Args:
        own: the settings; ``kwargs`` go before all else.
        graph: prepared.

    Raises:
        UsageError: there is no such name, or it cannot be called so, or it makes no module.
        TrainingError: its module fails while it is imported.
    """
    make = _target(own)
    data = graph.data
    known: dict[str, Any] = {
        **dict.fromkeys(("in_channels", "num_features"), data.x.size(-1)),
        **dict.fromkeys(("out_channels", "num_classes"), graph.num_classes),
        "num_nodes": data.num_nodes,
        "num_layers": own.num_layers,
        "hidden_channels": own.hidden_channels,
        "dropout": own.dropout,
        "data": data,
    }
    try:
        signature = inspect.signature(make).parameters
    except ValueError as error:  # of some that are written in C
        raise UsageError(
            f"model.target={own.target} does not say what it takes: give a function that calls it"
        ) from error
    given = {name: value for name, value in known.items() if name in signature and value is not None} | own.kwargs
    try:
        network = make(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"model.target={own.target} cannot be called with {', '.join(sorted(given)) or 'nothing'}: {error}. It "
            f"gets what it names of {', '.join(known)}; give all else by model.kwargs.NAME=VALUE"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"model.target={own.target} made a {type(network).__name__}, and not a torch.nn.Module")
    return network


def _target(own: ImportSettings) -> Callable[..., Any]:
    if not own.target:
        raise UsageError(f"model=import needs model.target: {_FORM}")
    module, colon, name = own.target.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(f"model.target={own.target}: {_FORM}")
    if own.folder and own.folder not in sys.path:
        sys.path.insert(0, own.folder)  # for good: what is imported from there may import others later
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"model.target={own.target}: {error}; it was looked for in {own.folder} too") from error
    except Exception as error:  # whatever the module does while it is imported
        raise TrainingError(f"model.target={own.target}: {module} fails: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = [item for item in dir(found) if not item.startswith("_")]
            raise UsageError(f"model.target={own.target}: " + choose_from(f"name in {module}", part, names))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"model.target={own.target} is a {type(found).__name__}, and not a class or a function")
    return cast(Callable[..., Any], found)
