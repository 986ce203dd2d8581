"""Which storages a region reads and writes, and what those that it writes held before."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.parameter import is_lazy

from recollect._storages import storages_of, storages_within
from recollect._torch import (
    TorchDispatchMode,
    is_faked,
    write_undeclared,
)
from recollect.frames._modes import local

__all__ = ["Copy", "Watch", "attributes_of", "key_of", "place_of", "version_of"]


def version_of(tensor: Tensor) -> int:
    """Return the in-place version of a tensor; inference tensors have none, and count as unchanged."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def attributes_of(tensor: Tensor) -> dict[str, Any] | None:
    """Return a copy of the attributes that Python holds of a tensor beside torch's own, which detaching loses."""
    attributes = getattr(tensor, "__dict__", None)
    return dict(attributes) if attributes else None


def key_of(storage: UntypedStorage) -> int:
    """Return the number of a storage, which another may have when it is gone."""
    number: int = storage._cdata
    return number


def place_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the keys of a tensor's storages."""
    kind = type(tensor)
    if (kind is Tensor or kind is nn.Parameter) and tensor.layout is torch.strided:
        return (tensor.untyped_storage()._cdata,)
    return () if is_lazy(tensor) else tuple(key_of(storage) for storage in storages_of(tensor))


class Copy:
    """What a tensor or a storage held before it was written to, where that is known.

    Args:
        of: the tensor or storage.
        then: what it held.
        written: the tensor through which a storage was written.
    """

    __slots__ = ("_storage", "_tensor", "_written", "then")

    def __init__(self, of: Tensor | UntypedStorage, then: Tensor | None, written: Tensor | None = None) -> None:
        self._tensor = of if isinstance(of, Tensor) else None
        self._written = None if written is None else weakref.ref(written)
        self._storage = None if isinstance(of, Tensor) else weakref.ref(of)
        self.then = then

    def target(self) -> Tensor | None:
        """Return a tensor to write to that counts no versions; ``None`` if the storage is gone."""
        if self._tensor is not None:
            return self._tensor.data
        storage = self._storage() if self._storage is not None else None
        return None if storage is None else _bytes_of(storage)

    def keys_brought_back(self) -> tuple[int, ...]:
        """Return the keys of the storage whose contents this has."""
        storage = self._storage() if self._storage is not None else None
        return () if self.then is None or storage is None else (key_of(storage),)

    def lead_to(self, target: Tensor) -> None:
        """Let the tensor, if this is of one, have the memory of ``target`` again (it may have been given another)."""
        if self._tensor is not None and place_of(self._tensor) != place_of(target):
            self._tensor.data = target

    def tensor(self) -> Tensor | None:
        """Return the tensor itself, if this is of one."""
        return self._tensor

    def counting(self) -> Tensor | None:
        """Return a tensor whose version tells of writes, if it is still there."""
        tensor = self._tensor if self._written is None else self._written()
        return None if tensor is None or tensor.is_inference() else tensor


def _bytes_of(storage: UntypedStorage) -> Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which storages from outside the operations of its body read and write.

    Attributes:
        read: keys of the storages that were read.
        written: storages that were written, by key, with what they held before.
        unsettled: storages whose contents do not follow from what was computed: operations fill them after autograd has
            saved them, or leave some of their bytes as they were.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks are not to be compiled anew because somebody watches."""
        return True

    def __init__(self, copies: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()
        self.written: dict[int, Copy] = {}
        self.unsettled: set[int] = set()
        self._made: set[int] = set()
        self._copies = copies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_faked():  # also where a DTensor asks fake ones for the shape of its output
            return func(*args, **(kwargs or {}))
        if any(kind.__torch_dispatch__ is not _PLAIN_DISPATCH for kind in types):
            return NotImplemented  # a subclass with operations of its own unwraps first; what it runs is seen
        kwargs = kwargs or {}
        if local.aside:
            return func(*args, **kwargs)
        inputs = {key_of(storage) for storage in storages_within((args, kwargs))}
        if func is _LIFT_FRESH:  # torch.tensor(...): its argument was made a moment ago, unseen
            self._made |= inputs
        if func._schema.name in _FILLING:
            self.unsettled.update(key for value in args[1:2] for key in place_of(value))
        outside = inputs - self._made
        if outside:
            self.read |= outside
            self._note_writes(func, args, kwargs, outside)
        out = func(*args, **kwargs)
        position = _WORKSPACES.get(func._schema.name)
        if position is not None:
            self.unsettled.update(place_of(out[position]))
        self._made.update(key for key in map(key_of, storages_within(out)) if key not in inputs)
        return out

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outside: set[int]) -> None:
        targets = write_undeclared(func, args)
        schema = func._schema
        if schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    targets.extend(given if isinstance(given, (list, tuple)) else [given])
        for target in targets:
            if isinstance(target, Tensor):
                for storage in storages_of(target):
                    key = key_of(storage)
                    if key in outside and key not in self.written:
                        then = _bytes_of(storage).clone() if self._copies else None
                        self.written[key] = Copy(storage, then, target if target._base is None else target._base)


_PLAIN_DISPATCH = Tensor.__torch_dispatch__
_LIFT_FRESH = torch.ops.aten.lift_fresh.default
# Operations that autograd lets save an argument before they fill it (the second).
_FILLING = frozenset(["aten::rrelu_with_noise", "aten::rrelu_with_noise_"])
# Operations that hand memory of their own form to their backward, and do not write every byte of it: which of their
# outputs it is.
_WORKSPACES = {"aten::mkldnn_rnn_layer": 3, "aten::_cudnn_rnn": 3, "aten::miopen_rnn": 3}
