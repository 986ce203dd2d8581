"""Which parts of a model are treated as units: found by structure, or told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from recollect import invertible, reversible

__all__ = ["Units", "find_units", "is_inverted"]

Units = type | str | nn.Module | Callable[[nn.Module], bool] | Iterable[type | str | nn.Module]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_INVERTIBLE = (invertible.Module, reversible.InvertibleModule)


def find_units(model: nn.Module, units: Units | None = None) -> dict[str, nn.Module]:
    """Return the units of a model by name, none of them inside another.

    Without ``units`` these are the children of a ``Sequential``, ``ModuleList`` or ``ModuleDict`` in which a type is
    repeated, of the outermost such containers, and layers that have an inverse. A child that is itself such a
    container gives its children.

    Args:
        model: where they are looked for.
        units: what is a unit: a type, a name with ``*`` and ``?`` allowed, a module of the model (of a ``ModuleList``
            its children), several of these, or a predicate of modules.

    Raises:
        ValueError: there are none.
        TypeError: ``units`` is none of these.

    Example:
        >>> from torch import nn
        >>> from recollect.budget import find_units
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*[nn.Linear(8, 8) for _ in range(2)]), nn.Tanh())
        >>> list(find_units(model)), list(find_units(model, nn.Linear))
        (['1.0', '1.1'], ['0', '1.0', '1.1'])
    """
    if units is None:
        found = dict(_by_structure("", model))
        remedy = (
            "no container in it repeats a type of layers, and none has an inverse; name them: units=Block, "
            "units='layers.*', or units=lambda module: ..."
        )
    else:
        matches = _predicate(units)
        found = {name: module for name, module in model.named_modules() if _can_be(module) and matches(name, module)}
        remedy = f"units={units!r} matches none of its modules that have a forward of their own"
    outer = {
        name: module
        for name, module in found.items()
        if not any(name != other and (other == "" or name.startswith(f"{other}.")) for other in found)
    }
    if not outer:
        raise ValueError(f"{type(model).__name__} has no units: {remedy}")
    return outer


def is_inverted(module: nn.Module) -> bool:
    """Whether a module brings its inputs back by an inverse, as it is set."""
    if isinstance(module, invertible.Module):
        return module.invertible
    return isinstance(module, reversible.InvertibleModule) and not module.disable


def _can_be(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule))


def _repeats(module: nn.Module) -> bool:
    """Whether a module is a container in which a type of layers is repeated."""
    if not isinstance(module, _CONTAINERS):
        return False
    # Unlike children(), with a layer as often as it is there: tied ones are a layer that is repeated.
    kinds = Counter(type(child) for child in module._modules.values() if child is not None)
    return any(number > 1 for number in kinds.values())


def _by_structure(name: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(module, _INVERTIBLE) and not _repeats(module):
        yield name, module
        return
    repeats = _repeats(module)
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not repeats or isinstance(child, _CONTAINERS):
            inside = list(_by_structure(path, child))
            yield from inside
            if inside or not repeats:
                continue
        if _can_be(child):
            yield path, child


def _predicate(units: Any) -> Callable[[str, nn.Module], bool]:
    if isinstance(units, type):
        return lambda _, module: isinstance(module, units)
    if isinstance(units, str):
        return lambda name, _: fnmatchcase(name, units)
    if isinstance(units, nn.Module):  # which can be called, and is no predicate
        chosen = [units] if _can_be(units) else list(units.children())
        return lambda _, module: any(module is one for one in chosen)
    if callable(units):
        return lambda _, module: bool(units(module))
    if isinstance(units, Iterable):
        parts = [_predicate(unit) for unit in units]
        return lambda name, module: any(part(name, module) for part in parts)
    raise TypeError(f"units must be types, names, modules, or a predicate of modules (got {units!r})")
