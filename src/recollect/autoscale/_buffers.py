"""Host memory that rows pass through, used again and again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Buffer", "Buffers"]


class Buffer:
    """Bytes in host memory, pinned if there is CUDA.

    Attributes:
        in_use: the copy from here to a device that was begun last, if any; wait for it before writing.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._flat = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
        self.in_use: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._flat.numel()

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return its first bytes as a tensor, about to be written: for autograd, earlier views change now."""
        self._flat[:0].zero_()
        return self._flat[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


class Buffers:
    """Up to a number of buffers, made when they are first needed, and as large as any was before.

    Args:
        size: how many there may be at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._nbytes = 0
        self._free: list[Buffer] = []
        self._taken: set[Buffer] = set()

    def take(self, nbytes: int) -> Buffer | None:
        """Return a buffer of at least so many bytes, or ``None`` if all are taken."""
        if len(self._taken) == self._size:
            return None
        self._nbytes = max(self._nbytes, nbytes)
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.nbytes < nbytes:
            buffer = Buffer(self._nbytes)
        self._taken.add(buffer)
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; one that is not from here is dropped."""
        if buffer in self._taken:
            self._taken.remove(buffer)
            self._free.append(buffer)
