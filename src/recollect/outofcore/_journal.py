"""What a step must know to go on in another process: the last operation, and the gradients of parameters so far.

Both are written in place by ``pwrite``, without a copy, and stay in the system's page cache: they outlive the process,
not the machine. (To wait for the disk at every operation takes longer than the operation.)
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories import HistoryFileError

__all__ = ["Journal", "Sums"]

_TENSOR = "tensor"


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor; they live as long as the tensor does."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _write(descriptor: int, content: memoryview, position: int) -> int:
    """Write all bytes; return the place behind them."""
    while content:
        done = os.pwrite(descriptor, content, position)
        content, position = content[done:], position + done
    return position


def _read(descriptor: int, tensor: Tensor, position: int) -> bool:
    """Fill a contiguous tensor; return whether the file had so many bytes."""
    left = _memory(tensor) if tensor.nbytes else memoryview(b"")
    while left:
        done = os.preadv(descriptor, [left], position)
        if not done:
            return False
        left, position = left[done:], position + done
    return True


class Journal:
    """The last two entries, in two places of which one is whole at any time.

    An entry is a head, which is written last, a description in JSON, and the bytes of its tensors. Both files are
    written in place: to replace a file makes the file system wait for the disk.

    Args:
        folder: of the files.
    """

    _HEAD = struct.Struct("<qqI")  # number of the entry from 1, bytes of its description, and their checksum

    def __init__(self, folder: Path) -> None:
        self._files = [_opened(folder / f"journal{i}") for i in (0, 1)]
        for descriptor in self._files:
            weakref.finalize(self, os.close, descriptor)
        self._number = max((self._described(descriptor)[0] for descriptor in self._files), default=0)

    def write(self, entry: Any) -> None:
        """Write an entry over the one before the last.

        Args:
            entry: of dicts, lists, numbers, strings, ``None``, and tensors on the CPU.
        """
        tensors: list[Tensor] = []
        description = json.dumps(_described(entry, tensors)).encode()
        number = self._number + 1
        descriptor = self._files[number % 2]
        position = _write(descriptor, memoryview(description), self._HEAD.size)
        for tensor in tensors:
            if tensor.nbytes:
                position = _write(descriptor, _memory(tensor), position)
        _write(descriptor, memoryview(self._HEAD.pack(number, len(description), zlib.crc32(description))), 0)
        self._number = number  # its head came last: now it is whole

    def clear(self) -> None:
        """Say that nothing is under way."""
        self.write(None)

    def last(self) -> Any:
        """Return the last entry that is whole; ``None`` if nothing is under way."""
        found = sorted(((*self._described(descriptor), descriptor) for descriptor in self._files), reverse=True)
        for number, description, descriptor in found:
            place = [self._HEAD.size + len(description)]
            entry = _found(json.loads(description), descriptor, place) if number else None
            if entry is not _BROKEN:
                return entry
        return None

    def _described(self, descriptor: int) -> tuple[int, bytes]:
        """Return the number and the description of a file's entry; 0 if there is none."""
        head = os.pread(descriptor, self._HEAD.size, 0)
        if len(head) < self._HEAD.size:
            return 0, b""
        number, size, checksum = self._HEAD.unpack(head)
        whole = number > 0 and 0 <= size < os.fstat(descriptor).st_size
        description = os.pread(descriptor, size, self._HEAD.size) if whole else b""
        return (number, description) if whole and zlib.crc32(description) == checksum else (0, b"")


_BROKEN = object()


def _described(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value without its tensors, which are put into a list."""
    if isinstance(value, Tensor):
        tensor = value.detach().contiguous()
        tensors.append(tensor)
        return {_TENSOR: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _checksum(tensor)]}
    if isinstance(value, dict):
        return {key: _described(each, tensors) for key, each in value.items()}
    return [_described(each, tensors) for each in value] if isinstance(value, (list, tuple)) else value


def _found(value: Any, descriptor: int, place: list[int]) -> Any:
    """Return a value with its tensors, which are read one behind the other."""
    if isinstance(value, dict) and value.keys() == {_TENSOR}:
        kind, shape, bits = value[_TENSOR]
        tensor = torch.empty(shape, dtype=getattr(torch, kind), device="cpu")
        whole = _read(descriptor, tensor, place[0]) and _checksum(tensor) == bits
        place[0] += tensor.nbytes
        return tensor if whole else _BROKEN
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        found = [_found(value[key], descriptor, place) for key in keys]
        if any(each is _BROKEN for each in found):
            return _BROKEN
        return dict(zip(keys, found, strict=True)) if isinstance(value, dict) else found
    return value


class Sums:
    """The gradients of parameters that a step has so far, in a file: each in its place, with a checksum.

    Args:
        path: of the file.
        kinds: a tensor of the shape and dtype of each.
        step: a number that no other step has.
    """

    _HEAD = struct.Struct("<qq")  # number of the step, and a checksum of the values

    def __init__(self, path: Path, kinds: Sequence[Tensor], step: int) -> None:
        self._path, self._step = path, step
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in kinds]
        self._places = [0]
        for tensor in kinds:
            self._places.append(self._places[-1] + self._HEAD.size + tensor.nbytes)
        self._descriptor = _opened(path)
        weakref.finalize(self, os.close, self._descriptor)
        os.posix_fallocate(self._descriptor, 0, max(self._places[-1], 1))

    def write(self, index: int, value: Tensor) -> None:
        """Write one."""
        value = value.detach().contiguous()
        head = self._HEAD.pack(self._step, _checksum(value))
        behind = _write(self._descriptor, memoryview(head), self._places[index])
        if value.nbytes:
            _write(self._descriptor, _memory(value), behind)

    def read(self, written: Iterable[int]) -> dict[int, Tensor]:
        """Return values by index.

        Args:
            written: the indices of those that were written.

        Raises:
            HistoryFileError: a value is not there, or another one.
        """
        found = {}
        for index in written:
            shape, dtype = self._kinds[index]
            head = os.pread(self._descriptor, self._HEAD.size, self._places[index])
            value = torch.empty(shape, dtype=dtype, device="cpu")
            whole = _read(self._descriptor, value, self._places[index] + self._HEAD.size)
            if not whole or self._HEAD.unpack(head) != (self._step, _checksum(value)):
                raise HistoryFileError(
                    f"{self._path}: expected the gradients that a step wrote (got something else: the file was cut or "
                    "changed): the step cannot go on; remove its step.pt, and begin it anew by step(criterion)"
                )
            found[index] = value
        return found


def _checksum(value: Tensor) -> int:
    """Return a checksum of a contiguous tensor's bytes; of small ones it is found faster than any in torch."""
    return zlib.crc32(_memory(value)) if value.nbytes else 0
