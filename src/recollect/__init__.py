"""Train networks whose depth, graph or objectives have outgrown memory: what backward needs is kept or recollected."""

import importlib
from types import ModuleType

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
    "backward_mode",
    "checkpoint",
    "checkpoint_sequential",
    "dry_mode",
    "eager_release",
    "in_backward",
    "in_dry_mode",
]

_PARTS = (
    "aggregation",
    "autogram",
    "autoscale",
    "data",
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


def __getattr__(name: str) -> ModuleType:
    """Import a part of the library when it is first asked for, so that ``import recollect`` needs torch alone."""
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its parts are {', '.join(_PARTS)}")


def __dir__() -> list[str]:
    """List the parts too, also those that are not imported yet."""
    return sorted({*globals(), *_PARTS})
