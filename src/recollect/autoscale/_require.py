"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(package: str, user: str, instead: str = "") -> Any:
    """Import a package, or raise an ImportError that says how to install it, who needs it and what does without it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0].replace("_", "-")
        raise ImportError(f"{user} needs the package {name}: pip install {name}{instead}") from error
