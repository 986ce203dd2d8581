"""What brings offloaded tensors back, wherever they lie."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.frames._watch import version_of

__all__ = ["Extent", "Fetch", "Store", "Stored"]

Fetch = Callable[[], list[Tensor]]
"""Waits for tensors that were asked for, and returns them; called once."""


class Extent:
    """What of a tensor is stored, as one flat piece, and how the tensor is made of it again.

    That is the memory that the tensor covers, where it covers no more than it has elements (also if they overlap, as
    expanded ones do); of a tensor with gaps, such as a slice of columns, its elements alone.
    """

    __slots__ = ("count", "device", "dtype", "packed", "shape", "strides")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.strides = tensor.stride()
        self.dtype = tensor.dtype
        self.device = tensor.device
        covered = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        self.packed = covered > tensor.numel() and not self._overlaps()
        self.count = tensor.numel() if self.packed else covered

    def _overlaps(self) -> bool:
        """Whether elements may share memory."""
        end = 1
        for step, n in sorted((s, n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1):
            if step < end:
                return True
            end += (n - 1) * step
        return False

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.count * self.dtype.itemsize

    def flat(self, tensor: Tensor) -> Tensor:
        """Return what is stored of the tensor [count]; a view where that is possible."""
        tensor = tensor.detach()
        if self.packed:
            return tensor.reshape(-1)
        return tensor.as_strided((self.count,), (1,), tensor.storage_offset())

    def restored(self, flat: Tensor) -> Tensor:
        """Return the tensor again, with its strides."""
        if not self.packed:  # not a view: who gets it may change it
            bare = torch.empty(0, dtype=self.dtype, device=flat.device)
            return bare.set_(flat.untyped_storage(), flat.storage_offset(), self.shape, self.strides)
        out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=flat.device)
        return out.copy_(flat.view(self.shape))

    def empty(self, device: torch.device | str, pin: bool = False) -> Tensor:
        """Return memory for what is stored [count]."""
        return torch.empty(self.count, dtype=self.dtype, device=device, pin_memory=pin)


class Stored:
    """One tensor in a store; what it takes there is given back when this dies."""

    __slots__ = ("__weakref__", "extent", "of", "place")

    def __init__(self, tensor: Tensor, extent: Extent, place: Any) -> None:
        self.extent = extent
        self.place = place
        self.of = weakref.ref(tensor.untyped_storage())


class Store:
    """Puts tensors somewhere and brings them back. A tensor that several calls share is stored once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.local = threading.local()  # what a source notes of each thread
        self._known: weakref.WeakValueDictionary[Any, Stored] = weakref.WeakValueDictionary()

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is stored; others stay where they are."""
        raise NotImplementedError

    def put(self, tensors: Sequence[Tensor]) -> list[Stored]:
        """Store the values that the tensors have now."""
        found, new = {}, {}
        for tensor in tensors:
            key = self._key(tensor)
            with self.lock:
                known = self._known.get(key)
            if known is not None and known.of() is tensor.untyped_storage():
                found[key] = known
            else:
                new[key] = tensor
        if new:
            with torch.inference_mode(False), torch.no_grad():
                stored = self._put(list(new.values()))
            found.update(zip(new, stored, strict=True))
            with self.lock:
                self._known.update((key, found[key]) for key in new if key[0])
        return [found[self._key(tensor)] for tensor in tensors]

    @staticmethod
    def _key(tensor: Tensor) -> tuple[Any, ...]:
        # Inference tensors count no versions: they are told apart by the object, and not found again.
        countless = tensor.is_inference()
        storage = id(tensor) if countless else tensor.untyped_storage()._cdata
        layout = (
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )
        return (not countless, storage, version_of(tensor), *layout)

    def _put(self, tensors: list[Tensor]) -> list[Stored]:
        raise NotImplementedError

    def returned(self, stored: Sequence[Stored]) -> None:
        """Take notice that the region which got these tensors has run."""

    def fetch(self, stored: Sequence[Stored]) -> Fetch:
        """Begin to bring tensors back, beside the computation."""
        raise NotImplementedError
