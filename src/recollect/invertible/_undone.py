"""What a check changes in a module, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect.frames import RandomState

__all__ = ["as_before", "left_as_it_is", "training_as"]


@contextmanager
def training_as(module: nn.Module, mode: bool) -> Iterator[None]:
    """Set the training flags for the body, unless the module's own is so already."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        if module.training != mode:
            module.train(mode)
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def as_before(module: nn.Module, state: RandomState) -> Iterator[None]:
    """Run the body from the same buffers and random state as every other, as rebuilds are."""
    with state.replayed(), ExitStack() as stack:
        copies: dict[int, Tensor] = {}  # a buffer of several modules stays one
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    stack.callback(part._buffers.__setitem__, name, buffer)
                    part._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield


@contextmanager
def left_as_it_is(module: nn.Module) -> Iterator[None]:
    """Give parameters their values again: some modules initialise theirs when they first run."""
    with ExitStack() as stack:
        for parameter in module.parameters():
            if not is_lazy(parameter):
                stack.callback(_restore, parameter, parameter.detach().clone())
        yield


def _restore(parameter: Tensor, value: Tensor) -> None:
    if not torch.equal(parameter.detach(), value):
        parameter.data.copy_(value)
