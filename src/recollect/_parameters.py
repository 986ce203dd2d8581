"""Drawing parameters anew."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["reset_parameters"]


def reset_parameters(module: Any) -> None:
    """Call ``reset_parameters`` of the module, or, where it has none, of its submodules."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif isinstance(module, nn.Module):
        for child in module.children():
            reset_parameters(child)
