"""What layers find when they run for nodes outside of a mini-batch: modes, inputs, state, autocast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recollect._util._tree import Tree
from recollect.autoscale._network import State
from recollect.autoscale._separable import Blank
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.autoscale.histories._history import History
from recollect.autoscale.loader._outward import Outward

__all__ = ["Plain", "blank_of", "inputs_of"]


class Plain:
    """Runs in evaluation mode what is within: dropout is its mean, and nothing is counted or drawn.

    Args:
        model: whose modules but histories are looked for once.

    Attributes:
        modes: which of them are in training mode, at first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = tuple(_parts(model))
        self.modes = tuple(module.training for module in self._modules)

    def versions(self) -> list[int]:
        """Return how often each buffer was written to."""
        return [buffer._version for module in self._modules for buffer in module.buffers(recurse=False)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        _set_modes(training, False)
        try:
            yield
        finally:
            _set_modes(training, True)


def _parts(model: nn.Module) -> Iterable[nn.Module]:
    """Return a model's modules but those of histories, as `modules()` does, whose walk takes far longer."""
    found, coming = dict[int, nn.Module](), [model]
    while coming:
        module = coming.pop()
        if id(module) not in found and not isinstance(module, GradientHistories | History):
            found[id(module)] = module
            coming.extend(reversed(list(module.children())))
    return found.values()


def _set_modes(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        values = vars(module)
        if "training" in values:  # by far faster than by the module's own way
            values["training"] = training
        else:
            module.training = training


def inputs_of(inputs: dict[str, Any], outward: Outward) -> State:
    """Return the inputs of the outward edges."""
    found = {}
    for name, value in inputs.items():
        if name in outward.nodes or name in outward.edges:
            value = outward.nodes[name] if name in outward.nodes else outward.edges[name]
        elif isinstance(value, Tensor) and value.dim() and name not in outward.others:
            raise ValueError(
                f"the layers get {name}= {list(value.shape)}, but the graph of the mini-batch's loader has no {name} "
                "for the nodes and edges outside: with compensate=True such inputs are attributes of the graph, and "
                "have their names"
            )
        found[name] = value
    return found


def blank_of(inputs: State, state: State) -> Blank:
    """Return what makes a state for some targets: the inputs, and zeros for what earlier layers left."""
    tree = Tree({name: value for name, value in state.items() if name not in inputs})
    kinds = [(tensor.shape[1:] if tensor.dim() else None, tensor.dtype, tensor.device) for tensor in tree.tensors]
    tree.tensors.clear()

    def make(targets: int) -> State:
        zeros = [
            torch.zeros(() if shape is None else (targets, *shape), dtype=dtype, device=device)
            for shape, dtype, device in kinds
        ]
        left: State = tree.build(zeros)
        return inputs | left

    return make
