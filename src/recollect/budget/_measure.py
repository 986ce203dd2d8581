"""One forward pass in which every unit is measured: what it keeps, what it takes, what it costs to run again."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from recollect._storages import storages_of
from recollect._torch import saved_tensor_hooks
from recollect._util._tree import Tree, tensors_among, tensors_of
from recollect.budget._cost import Cost, Options, cost_of
from recollect.frames import Forward, FrameError, backward_mode, frames_apply

__all__ = ["Call", "Measured", "measure"]


@dataclass
class Call:
    """One call of a unit in the forward pass.

    Args:
        name: of the unit.
        module: the unit.
        cost: of its kind; ``None`` where no frame can stand around it, or what one rebuilds is not what was there.
        saved: storages that autograd saves in it, by key, with their bytes.
        taken: those of its inputs.
        made: those of its outputs.
        chained: whether it takes what the call before returned.
        before: how many storages operations outside of units have saved before it.
    """

    name: str
    module: nn.Module
    cost: Cost | None
    saved: dict[int, int]
    taken: dict[int, int]
    made: dict[int, int]
    chained: bool
    before: int = 0
    outside: int = 0  # bytes of these
    kept: int = 0
    input: int = 0
    gradients: int = 0  # of parameters that have theirs when backward comes to it


@dataclass
class Measured:
    """All calls in order, and what is kept outside of units."""

    calls: list[Call] = field(default_factory=list)
    outside: int = 0


class _Storages:
    """Storages by a number of their own: the address of one that was freed may come again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._next = 0

    def keys(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        found = {}
        for tensor in tensors:
            for storage in storages_of(tensor):
                known = self._known.get(storage._cdata)
                if known is None or known[0]() is not storage:
                    self._next += 1
                    known = self._known[storage._cdata] = (weakref.ref(storage), self._next)
                found[known[1]] = storage.nbytes()
        return found

    def alive(self) -> set[int]:
        """Return the keys of those that are still there."""
        return {key for storage, key in self._known.values() if storage() is not None}


class _Pass:
    """What the forward pass that is measured has seen so far."""

    def __init__(self, lasting: Iterable[Tensor], options: Options) -> None:
        self.options = options
        self.storages = _Storages()
        self.lasting = set(self.storages.keys(lasting))
        self.calls: list[Call] = []
        self.outside: dict[int, int] = {}
        self.saved: list[Tensor] | None = None  # in the unit that runs; None: outside of units
        self.trying = False
        self.kinds: dict[Any, Cost | None] = {}
        self.last: list[tuple[weakref.ref[Tensor], int]] = []  # what the call before returned

    def keys(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        return {key: n for key, n in self.storages.keys(tensors).items() if key not in self.lasting}

    def pack(self, tensor: Tensor) -> Tensor | None:
        bare = tensor.detach()
        if self.trying:
            return bare
        if self.saved is not None:
            self.saved.append(bare)
            return None  # nothing goes backward through it
        self.outside.update(self.keys([tensor]))
        return bare


class _Probe(Forward):
    """Measures a unit where it is called."""

    __slots__ = ("name", "seen")

    def __init__(self, module: nn.Module, name: str, seen: _Pass) -> None:
        super().__init__(module)
        self.name = name
        self.seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        module = self._module()
        assert module is not None
        plain = Forward(module)  # a copy of the unit is none
        plain.before = self.before
        return plain.__reduce__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = self.seen
        hooks = saved_tensor_hooks()
        if seen.trying or seen.saved is not None or not frames_apply() or hooks is None or hooks[0] != seen.pack:
            return self.own()(*args, **kwargs)
        module, own = self._module(), self.own(plain=True)
        assert module is not None
        given = tensors_among(args, kwargs)
        taken = seen.keys(given)
        chained = any(r() is t and t._version == v for r, v in seen.last for t in given)
        versions = [t._version for t in given]
        before = len(seen.outside)
        seen.saved = []
        copies = Tree((args, kwargs))
        copies.tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in copies.tensors]
        output = own(*args, **kwargs)
        made = list(tensors_of(output))
        bare, seen.saved = seen.saved, None
        saved = seen.keys(bare)
        parts = (given, bare, made, module.parameters())
        kind: tuple[Any, ...] = (type(module), module.training, *map(_metas, parts))
        if seen.options.apart:
            kind = (self.name, *kind)
        del bare
        cost = None
        if all(t._version == v for t, v in zip(given, versions, strict=True)) and any(t.requires_grad for t in made):
            if kind not in seen.kinds:
                seen.trying = True
                try:
                    with backward_mode():
                        seen.kinds[kind] = cost_of(module, own, self.own(), copies, seen.options, len(seen.kinds))
                finally:
                    seen.trying = False
            cost = seen.kinds[kind]
        seen.calls.append(Call(self.name, module, cost, saved, taken, seen.keys(made), chained, before))
        seen.last = [(weakref.ref(t), t._version) for t in made if t.requires_grad]
        return output


class _BackwardError(FrameError):
    """Somebody goes backward in the forward pass that is measured."""


def _unpack(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise _BackwardError("what a unit keeps is not there while it is measured")
    return tensor


def _metas(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)


def measure(
    units: dict[str, nn.Module], step: Callable[[], Tensor], model: nn.Module, inputs: Any, options: Options
) -> Measured:
    """Run one forward pass and return what it says of each call of a unit.

    Args:
        units: by name.
        step: runs the forward pass, and returns the loss.
        model: whose parameters and buffers live on anyway.
        inputs: of the model, which do too.
        options: the device, and what comes into question.

    What runs in a frame, or in another checkpoint, is not measured: that one answers for what it keeps.
    """
    lasting = [*model.parameters(), *model.buffers(), *tensors_of(inputs)]
    seen = _Pass(lasting, options)
    probes = [_Probe(module, name, seen) for name, module in units.items()]
    for probe in probes:
        probe.put()
    try:
        with saved_tensors_hooks(seen.pack, _unpack):
            loss = step()
        del loss
    except _BackwardError as error:
        raise ValueError(
            "the step goes backward itself (autograd.grad, as for a gradient penalty, or backward()), and what units "
            "keep until then is not known: plan for a loss that is made by forward passes alone"
        ) from error
    finally:
        for probe in reversed(probes):
            probe.take()
    gc.collect()
    return _settled(seen, model)


def _settled(seen: _Pass, model: nn.Module) -> Measured:
    """Say who answers for which bytes: each storage counts once, where it is kept first of all.

    What is still there when the graph is gone (an adjacency that a layer holds, a cache) is nobody's.
    """
    calls, anyway = seen.calls, seen.storages.alive()
    for call in calls:
        for found in (call.saved, call.taken, call.made):
            for key in anyway & found.keys():
                del found[key]
    seen.outside = {key: 0 if key in anyway else n for key, n in seen.outside.items()}
    times: dict[int, int] = {}
    for call in calls:
        for key in call.taken:
            times[key] = times.get(key, 0) + 1
    shared = {key for call in calls for key, n in call.taken.items() if times[key] > 1}
    outside = dict(seen.outside)
    for call in calls:
        outside.update((key, n) for key, n in call.taken.items() if key in shared)
    owners: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for index, call in enumerate(calls):
        for parameter in call.module.parameters():
            if parameter.requires_grad:
                owners[id(parameter)], sizes[id(parameter)] = index, parameter.nbytes
    rest = sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) not in owners)
    sums = [0, *itertools.accumulate(seen.outside.values())]
    for index, call in enumerate(calls):
        call.outside = sums[call.before]
        after = calls[index + 1] if index + 1 < len(calls) else None
        theirs = {} if after is None else {k: n for k, n in after.taken.items() if k in after.saved}
        call.kept = sum(n for key, n in call.saved.items() if key not in outside and key not in theirs)
        call.input = sum(n for key, n in call.taken.items() if key not in outside)
        call.gradients = rest + sum(sizes[key] for key, owner in owners.items() if owner > index)
        others = [key for key in call.taken if key not in outside]
        if call.chained and (index == 0 or not set(others) <= set(calls[index - 1].made)):
            call.chained = False
    return Measured(calls, sum(outside.values()))
