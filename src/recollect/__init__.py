"""Train networks whose depth, graph or objectives have outgrown memory: what backward needs is kept or recollected."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.budget import apply, plan
    from recollect.frames import (
        backward_mode,
        checkpoint,
        checkpoint_sequential,
        dry_mode,
        eager_release,
        in_backward,
        in_dry_mode,
    )

__version__ = "0.1.0"

__all__ = [
    "apply",
    "backward_mode",
    "checkpoint",
    "checkpoint_sequential",
    "dry_mode",
    "eager_release",
    "in_backward",
    "in_dry_mode",
    "plan",
]

_PARTS = (
    "aggregation",
    "autogram",
    "autoscale",
    "budget",
    "data",
    "distributed",
    "frames",
    "invertible",
    "memory",
    "messages",
    "models",
    "outofcore",
    "reversible",
    "testing",
    "train",
)


def __getattr__(name: str) -> Any:
    """Import a part of the library when it is first asked for: ``import recollect`` needs nothing, not even torch."""
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        home = "budget" if name in ("apply", "plan") else "frames"
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its parts are {', '.join(_PARTS)}")


def __dir__() -> list[str]:
    """List the parts too, also those that are not imported yet."""
    return sorted({*globals(), *_PARTS, *__all__})
