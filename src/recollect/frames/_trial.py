"""Steps that are only tried: afterwards the module holds what it held."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect._torch import STANDARD_ATTRIBUTES
from recollect.frames._random import RandomState
from recollect.frames._state import PythonState

__all__ = ["Others", "gradients_of", "trial"]


@contextmanager
def trial(module: nn.Module, devices: Iterable[torch.device], leaves: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run steps of a module in the body, and put back what they change.

    These are buffers, attributes of its parts, gradients of parameters and of ``leaves`` (in the body there are none
    at first), and random state: the CPU's and the devices', Python's and NumPy's. Hooks on gradients of these, which
    may move parameters, are not called.

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
    numpy = sys.modules.get("numpy")
    generators = (random.getstate(), None if numpy is None else numpy.random.get_state())
    draws = RandomState(set(devices))
    kept = [_Kept(part) for part in module.modules()]
    gradients = _Gradients([*module.parameters(), *leaves])
    try:
        with draws.replayed():
            yield
    finally:
        gradients.put_back()
        for each in kept:
            each.put_back()
        random.setstate(generators[0])
        if numpy is not None and generators[1] is not None:
            numpy.random.set_state(generators[1])


class Others:
    """Modules that run beside one that is tried, such as a head or a criterion, and what they held.

    Args:
        module: whose parts are left alone.

    Example:
        >>> import torch
        >>> from recollect.frames import Others
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> others = Others(torch.nn.Linear(3, 3))
        >>> with others.noted():
        ...     out = norm(torch.randn(5, 3))
        >>> others.put_back()
        >>> norm.num_batches_tracked
        tensor(0)
    """

    def __init__(self, module: nn.Module) -> None:
        self._known = {id(part) for part in module.modules()}
        self._kept: list[_Kept] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what modules hold that run in the body."""
        handle = nn.modules.module.register_module_forward_pre_hook(self._enter)
        try:
            yield
        finally:
            handle.remove()

    def put_back(self) -> None:
        """Let them hold that again."""
        for each in self._kept:
            each.put_back()
        self._kept.clear()

    def _enter(self, part: nn.Module, args: Any) -> None:
        for each in part.modules() if id(part) not in self._known else ():
            if id(each) not in self._known:
                self._known.add(id(each))
                self._kept.append(_Kept(each))


@contextmanager
def gradients_of(loss: Tensor) -> Iterator[None]:
    """Put back the gradients of all leaves that a loss depends on; in the body there are none at first.

    Example:
        >>> import torch
        >>> from recollect.frames import gradients_of
        >>> w = torch.ones(3, requires_grad=True)
        >>> loss = (2 * w).sum()
        >>> with gradients_of(loss):
        ...     loss.backward()
        ...     print(w.grad)
        tensor([2., 2., 2.])
        >>> w.grad is None
        True
    """
    found: dict[int, Tensor] = {}
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        waiting.extend(following for following, _ in node.next_functions)
    del waiting, seen
    gradients = _Gradients(list(found.values()))
    try:
        yield
    finally:
        gradients.put_back()


class _Kept:
    """What a module, without its parts, held."""

    def __init__(self, module: nn.Module) -> None:
        self._state = PythonState()
        self._state.add_namespace(vars(module), STANDARD_ATTRIBUTES)
        self._registry, self._held = module._buffers, dict(module._buffers)
        self._values = {
            name: buffer.detach().clone()
            for name, buffer in self._held.items()
            if buffer is not None and not is_lazy(buffer)
        }

    def put_back(self) -> None:
        self._registry.update(self._held)
        with torch.no_grad():
            for name, value in self._values.items():
                buffer = self._registry[name]
                if buffer is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        self._state.settle()
        self._state.write_then(self._state.now())


class _Gradients:
    """Gradients of leaves, and the hooks on these, which are set aside."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self._gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.is_leaf and not is_lazy(leaf)]
        self._hooks: list[tuple[Any, dict[Any, Any]]] = []
        for leaf, _ in self._gradients:
            leaf.grad = None
            for hooks in (leaf._backward_hooks, getattr(leaf, "_post_accumulate_grad_hooks", None)):
                if hooks:
                    self._hooks.append((hooks, dict(hooks)))
                    hooks.clear()

    def put_back(self) -> None:
        for leaf, gradient in self._gradients:
            leaf.grad = gradient
        for hooks, held in self._hooks:
            hooks.update(held)
