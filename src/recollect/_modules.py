"""Modules whose parts are run one by one: in evaluation, and without what is called only with the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["check_unhooked", "in_evaluation"]

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Run the body in evaluation mode; every submodule's mode is given back."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def check_unhooked(modules: Iterable[tuple[str, nn.Module]], *, backward: bool = False) -> None:
    """Check that modules which are not called as such have no hooks.

    Args:
        modules: with their names.
        backward: whether hooks of backward count too.

    Raises:
        ValueError: one has.
    """
    for name, module in modules:
        kinds = (*_FORWARD, *_BACKWARD) if backward else _FORWARD
        found = [kind.removeprefix("_") for kind in kinds if getattr(module, kind)]
        if found:
            raise ValueError(
                f"{name} ({type(module).__name__}) has {' and '.join(found)}, which are not called where layers are "
                "computed one by one, part by part: remove them, or register them on the modules that a layer runs"
            )
