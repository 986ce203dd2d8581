"""Steps that are only tried: afterwards the module holds what it held."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect._torch import STANDARD_ATTRIBUTES
from recollect.frames._random import RandomState
from recollect.frames._state import PythonState

__all__ = ["trial"]


@contextmanager
def trial(module: nn.Module, devices: Iterable[torch.device], leaves: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run steps of a module in the body, and put back what they change.

    These are buffers, attributes of its parts, gradients of parameters and of ``leaves`` (in the body there are none
    at first), and random state: the CPU's and the devices', Python's and NumPy's.

    Args:
        module: of which steps are run.
        devices: whose random state counts.
        leaves: other tensors that get gradients.

    Example:
        >>> import torch
        >>> from recollect.frames import trial
        >>> model, state = torch.nn.BatchNorm1d(3), torch.get_rng_state()
        >>> with trial(model, [torch.device("cpu")]):
        ...     model(torch.randn(5, 3)).sum().backward()
        >>> model.weight.grad is None, model.num_batches_tracked, torch.equal(torch.get_rng_state(), state)
        (True, tensor(0), True)
    """
    state = PythonState()
    for part in module.modules():
        state.add_namespace(vars(part), STANDARD_ATTRIBUTES)
    numpy = sys.modules.get("numpy")
    generators = (random.getstate(), None if numpy is None else numpy.random.get_state())
    draws = RandomState(set(devices))
    buffers = [(b, b.detach().clone()) for b in module.buffers() if not is_lazy(b)]
    gradients = [(leaf, leaf.grad) for leaf in (*module.parameters(), *leaves) if leaf.is_leaf and not is_lazy(leaf)]
    registries = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    try:
        for leaf, _ in gradients:
            leaf.grad = None
        with draws.replayed():
            yield
    finally:
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for registry, held in registries:
            registry.update(held)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        random.setstate(generators[0])
        if numpy is not None and generators[1] is not None:
            numpy.random.set_state(generators[1])
        state.settle()
        state.write_then(state.now())
