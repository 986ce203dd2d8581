"""Chains of invertible stages that keep one tensor between them.

A stage makes output tensors from input tensors and can go back. Each output has a :class:`Slot`. While nobody inverts
from further on, the slot keeps the tensor; once the tensor becomes the input of another stage, the slot keeps a link
to that stage instead and asks it when the value is needed. Frames pull; nobody pushes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect.frames._describe import describe
from recollect.frames._errors import RebuildError
from recollect.frames._keep import Kept
from recollect.frames._modes import local
from recollect.frames._modules import version_of

__all__ = ["Parts", "Slot", "Stage", "slot_of"]


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


class Stage(Protocol):
    """An invertible step of the forward pass, as the slots of its inputs see it."""

    def missing(self) -> list[Slot]:
        """Return the output slots whose values :meth:`invert` would take."""

    def invert(self) -> None:
        """Give every input slot its value (:meth:`Slot.offer`); the slots of :meth:`missing` are ready."""


class Slot:
    """The value of one tensor between two stages: kept, or to be asked for.

    Args:
        tensor: the output of a stage; its memory is kept until another stage can bring it back.
        position: how many stages of its chain came before, this one included.
        function: the stage's module, for messages.
    """

    __slots__ = ("__weakref__", "_cache", "_function", "_kept", "_scope", "_tensor", "_version", "maker", "position")

    def __init__(self, tensor: Tensor, position: int, function: Callable[..., Any]) -> None:
        self.position = position
        self._scope = None if local.scope is None else weakref.ref(local.scope)
        self._function = function
        self.maker: Stage | None = None
        self._kept: Kept | None = Kept(tensor.detach())
        self._cache: Tensor | Parts | None = None
        self._version = version_of(tensor)
        self._tensor = weakref.ref(tensor)
        _slots[tensor] = weakref.ref(self)

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
        storage = tensor.untyped_storage()
        return tensor.detach() if storage.nbytes() > 0 or tensor.numel() == 0 else None


_slots: MutableMapping[Tensor, weakref.ref[Slot]] = WeakTensorKeyDictionary()


def slot_of(tensor: Tensor) -> Slot | None:
    """Return the slot of a tensor that a stage of the running region made and nobody has changed since."""
    reference = _slots.get(tensor)
    slot = reference() if reference is not None else None
    return slot if slot is not None and slot.here and version_of(tensor) == slot._version else None
