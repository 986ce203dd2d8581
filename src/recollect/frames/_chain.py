"""Chains of invertible stages that keep one tensor between them.

A stage makes output tensors from input tensors and can go back. Each output has a :class:`Slot`. While nobody inverts
from further on, the slot keeps the tensor; once the tensor becomes the input of another stage, the slot keeps a link
to that stage instead and asks it when the value is needed. Frames pull; nobody pushes.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect.frames._drift import DriftGauge, DriftProbe
from recollect.frames._errors import RebuildError, describe
from recollect.frames._fingerprint import Fingerprint
from recollect.frames._modes import enclosing, local
from recollect.frames._watch import version_of
from recollect.frames.sources._kept import KeptTensor, storage_of

__all__ = ["Parts", "Slot", "Stage", "StoragePolicy", "slot_of"]


class Parts:
    """A tensor as its pieces along one dimension, so that a chain neither splits nor joins it needlessly.

    Args:
        tensors: the pieces, in order.
        dim: the dimension along which they lie.
    """

    __slots__ = ("dim", "tensors")

    def __init__(self, tensors: Sequence[Tensor], dim: int) -> None:
        self.tensors = list(tensors)
        self.dim = dim

    def whole(self) -> Tensor:
        """Return the pieces joined."""
        return torch.cat(self.tensors, self.dim)


def whole(value: Tensor | Parts) -> Tensor:
    """Return a value as one tensor."""
    return value.whole() if isinstance(value, Parts) else value


class StoragePolicy(Protocol):
    """Somebody who does something to the inputs of stages that a stage can bring back (``local.policy``)."""

    def closed(self, stage: Stage, inputs: Sequence[Tensor], outputs: Sequence[Any], name: str) -> None:
        """Take notice of a stage whose forward is over; it can bring ``inputs`` back."""


class Stage(ABC):
    """An invertible step of the forward pass: its place in a chain, and what goes through it in backward.

    Attributes:
        lock: held in rebuilds of its frames and while it is inverted.
        scope: what its frames belong to.
        outputs: slots of its output tensors, other outputs as they are.
        restored: is given the inputs whenever they were brought back.
    """

    __slots__ = ("__weakref__", "_befores", "_passed", "_probe", "lock", "outputs", "restored", "scope")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.scope = enclosing()
        self.outputs: list[Any] = []
        self.restored: Callable[[Sequence[Tensor | Parts]], None] | None = None
        self._befores: list[weakref.ref[Slot] | None] = []  # the slots of the inputs
        self._passed: list[Slot] = []  # inputs that are outputs too
        self._probe: DriftProbe | None = None

    @abstractmethod
    def holds_outputs(self) -> bool:
        """Return whether the values of the outputs were taken already."""

    @abstractmethod
    def solve(self) -> None:
        """Bring the inputs back and :meth:`hand_back` them; the slots of :meth:`missing` are ready."""

    def join(
        self,
        inputs: Sequence[Tensor],
        *,
        samples: Sequence[Tensor] | None = None,
        returned: frozenset[int] = frozenset(),
        gauge: DriftGauge | None = None,
        anchor_every: int | None = None,
        digits: int | None = None,
        function: Callable[..., Any],
    ) -> int:
        """Take the place after the stages that made the inputs, and return how many come before.

        Args:
            inputs: what the stage can bring back, in the order of :meth:`hand_back`.
            samples: what drift is measured of, if it is not the inputs.
            returned: ids of inputs that are outputs as they are.
            gauge: where a chain's drift is recorded.
            anchor_every: keep the chain's every s-th activation.
            digits: k, where multiples of 2^-k come back bit for bit; inputs that must, and would not, are kept.
            function: the stage's module, for messages.
        """
        position, anchored, heads = 0, False, []
        for tensor in inputs:
            before = slot_of(tensor)
            heads.append(before is None)
            if id(tensor) in returned and (before is None or before.maker is None):
                before = before or Slot(tensor, 0, function)
                self._passed.append(before)
            keep = before is not None and (
                (anchor_every is not None and before.position % anchor_every == 0)
                or before.digits not in (None, digits)
            )
            if before is not None:
                if id(tensor) not in returned:
                    before.link(self, keep=keep)
                position = max(position, before.position)
            self._befores.append(weakref.ref(before) if before is not None else None)
            anchored = anchored or keep
        if gauge is not None and (anchored or all(heads)):
            self._probe = DriftProbe(inputs if samples is None else samples, gauge)
        return position

    def passes(self, tensor: Tensor) -> Slot | None:
        """Return the slot of an input that is an output too."""
        return next((slot for slot in self._passed if slot.tensor() is tensor), None)

    def missing(self) -> list[Slot]:
        """Return the output slots whose values :meth:`invert` would take."""
        return [] if self.holds_outputs() else [output for output in self.outputs if isinstance(output, Slot)]

    def invert(self) -> None:
        """Give every input slot its value."""
        with self.lock:
            self.solve()

    def hand_back(self, values: Sequence[Tensor | Parts], samples: Sequence[Tensor]) -> None:
        """Give the inputs that were brought back to whoever waits for them.

        Args:
            values: the inputs.
            samples: what drift is measured of; see :meth:`join`.
        """
        if self._probe is not None:
            self._probe.measure(samples)
        if self.restored is not None:
            self.restored(values)
        for reference, value in zip(self._befores, values, strict=True):
            slot = reference() if reference is not None else None
            if slot is not None and (slot.maker is self or slot in self._passed):
                slot.offer(value)


class Slot:
    """The value of one tensor between two stages: kept, or to be asked for.

    Args:
        tensor: the output of a stage; its memory is kept until another stage can bring it back.
        position: how many stages of its chain came before, this one included.
        function: the stage's module, for messages.

    Attributes:
        maker: the stage that brings it back, if there is one.
        mark: the tensor's fingerprint, if somebody took it.
        digits: k, if the values are multiples of 2^-k.
    """

    __slots__ = (
        "__weakref__", "_cache", "_function", "_kept", "_scope", "_tensor", "_version", "digits", "maker", "mark",
        "position",
    )  # fmt: skip

    def __init__(self, tensor: Tensor, position: int, function: Callable[..., Any]) -> None:
        self.position = position
        self.mark: Fingerprint | None = None
        self.digits: int | None = None
        self._scope = None if local.scope is None else weakref.ref(local.scope)
        self._function = function
        self.maker: Stage | None = None
        self._kept: KeptTensor | None = KeptTensor(tensor.detach())
        self._cache: Tensor | Parts | None = None
        self._version = version_of(tensor)
        self._tensor = weakref.ref(tensor)
        _slots[tensor] = weakref.ref(self)
        _slots_of_storages[storage_of(tensor)] = self

    def link(self, stage: Stage, keep: bool) -> None:
        """Ask ``stage``, whose input this is, from now on; with ``keep`` the tensor stays all the same (an anchor)."""
        if self.maker is None:
            self.maker = stage
            if not keep:
                self._kept = None

    def offer(self, value: Tensor | Parts) -> None:
        """Take the reconstructed value, to hand it out once."""
        if self._kept is None or self._kept.packed:
            alive = self._alive()  # no memory of its own, and exact
            self._cache = value if alive is None else alive

    def tensor(self) -> Tensor | None:
        """Return the forward's own tensor, if somebody still holds it."""
        return self._tensor()

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor has this slot's values: another view of the same memory, as hooks on inputs make them."""
        own = self._tensor()
        return own is not None and (
            own is tensor
            or (
                own.layout is torch.strided
                and tensor.layout is torch.strided
                and (own.shape, own.stride(), own.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
                and own.storage_offset() == tensor.storage_offset()
                and storage_of(own) == storage_of(tensor)
            )
        )

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether the values are those of the forward, as far as versions tell."""
        return version_of(tensor) == self._version

    @property
    def here(self) -> bool:
        """Whether it belongs to the region that this thread is running: another's would not be there in a rebuild."""
        return (None if self._scope is None else self._scope()) is local.scope

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` can answer without inverting a stage."""
        return self._cache is not None or self._kept is not None or self._alive() is not None

    def take(self) -> Tensor | Parts:
        """Return the value, inverting later stages where it is not at hand.

        Raises:
            InPlaceError: the tensor was changed in place since the forward pass.
        """
        pending = [self]
        while pending:
            slot = pending[-1]
            if slot.ready:
                pending.pop()
                continue
            if slot.maker is None:
                raise RebuildError(f"{describe(slot._function)}: its output was neither kept nor linked")
            missing = [s for s in slot.maker.missing() if not s.ready]
            if missing:
                pending.extend(missing)
            else:
                slot.maker.invert()
        return self._pop()

    def _pop(self) -> Tensor | Parts:
        value, self._cache = self._cache, None
        if value is not None:
            return value
        alive = self._alive()
        if alive is not None:
            return alive
        if self._kept is None:
            raise RebuildError(f"{describe(self._function)}: the stage after it did not bring its output back")
        return self._kept.get(self._function, "output")

    def _alive(self) -> Tensor | None:
        """The forward's own tensor, if somebody still holds it unchanged: then nothing need be reconstructed."""
        tensor = self.tensor()
        if tensor is None or version_of(tensor) != self._version or tensor.layout is not torch.strided:
            return None
        if tensor.device.type == "meta":
            return tensor.detach()
        storage = tensor.untyped_storage()
        return tensor.detach() if storage.nbytes() > 0 or tensor.numel() == 0 else None


_slots: MutableMapping[Tensor, weakref.ref[Slot]] = WeakTensorKeyDictionary()
_slots_of_storages: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


def slot_of(tensor: Tensor) -> Slot | None:
    """Return the slot of a tensor that a stage of the running region made and nobody has changed since.

    Hooks on a module's inputs (full backward hooks, sharding) hand it another tensor on the same memory: the same slot.
    """
    reference = _slots.get(tensor)
    slot = reference() if reference is not None else None
    if slot is None and not tensor.is_leaf:
        slot = _slots_of_storages.get(storage_of(tensor))
        if slot is not None and not slot.is_of(tensor):
            return None
    return slot if slot is not None and slot.here and slot.is_unchanged(tensor) else None
