"""Measured peak memory: the CUDA allocator's peak, and elsewhere the exact bytes of live tensors.

    with peak_memory("cpu") as memory:
        loss(model(x), y).backward()
    print(memory.peak_bytes, "bytes beside the", tensor_bytes(model), "of the model")

All devices report what was allocated *above what was live at entry*: parameters, inputs and gradients that
are there before the block are not in the figure, `tensor_bytes` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import UntypedStorage

from recollect._heap import map_large_blocks
from recollect._ledger import StorageLedger
from recollect._storages import storages_of, tensors_in

__all__ = ["PeakMemory", "map_large_blocks", "peak_memory", "tensor_bytes"]


class _Meter(Protocol):
    """What measures one device between `__enter__` and `__exit__`."""

    @property
    def current_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exc_info: object) -> None: ...


class _AllocatorMeter:
    """The CUDA allocator's peak on one device.

    The allocator has one peak per process, reset by each meter that starts; meters that are already open on
    the device take its value over before that, so nested meters are all right.
    """

    _open: list[_AllocatorMeter] = []  # noqa: RUF012  (shared on purpose, as the allocator's statistics are)

    def __init__(self, index: int) -> None:
        self._index = index
        self._start = 0
        self._highest = 0  # the allocator's peak up to the last reset by a nested meter
        self._end: tuple[int, int] | None = None  # bytes and highest bytes at exit

    @property
    def current_bytes(self) -> int:
        return (self._end[0] if self._end else torch.cuda.memory_allocated(self._index)) - self._start

    @property
    def peak_bytes(self) -> int:
        return (self._end[1] if self._end else self._look()) - self._start

    def _look(self) -> int:
        self._highest = max(self._highest, torch.cuda.max_memory_allocated(self._index))
        return self._highest

    def __enter__(self) -> None:
        for meter in self._open:
            if meter._index == self._index:
                meter._look()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # otherwise nothing was allocated yet, and there is nothing to reset
            torch.cuda.reset_peak_memory_stats(self._index)
        self._start = self._highest = torch.cuda.memory_allocated(self._index)
        self._end = None
        self._open.append(self)

    def __exit__(self, *exc_info: object) -> None:
        self._end = (torch.cuda.memory_allocated(self._index), self._look())
        self._open.remove(self)


class PeakMemory:
    """What `peak_memory` returns: a context manager that measures from its entry to its exit.

    It can be used again after its exit (and then starts anew), not inside itself.

    Example:
        >>> import torch
        >>> from recollect.memory import peak_memory
        >>> memory = peak_memory("cpu")
        >>> with memory:
        ...     kept = torch.zeros(1000)
        ...     _ = torch.ones(1000) * 2  # both are there for a moment
        >>> memory.peak_bytes, memory.current_bytes
        (12000, 8000)
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = tuple(devices)
        self._meters: dict[str, _Meter] = {}
        self._open = False

    @property
    def by_device(self) -> dict[str, int]:
        """The peak in bytes of each measured device, by name ("cpu", "cuda:0")."""
        return {name: meter.peak_bytes for name, meter in self._meters.items()}

    @property
    def peak_bytes(self) -> int:
        """The peak in bytes above what was live at entry; over several devices the sum of their peaks."""
        return sum(meter.peak_bytes for meter in self._meters.values())

    @property
    def current_bytes(self) -> int:
        """Bytes now above what was live at entry; after the exit, as it was at the exit."""
        return sum(meter.current_bytes for meter in self._meters.values())

    def __repr__(self) -> str:
        if not self._meters:
            return f"PeakMemory({', '.join(map(str, self._devices))}: not entered yet)"
        state = "measuring" if self._open else "measured"
        return f"PeakMemory({state}, peak_bytes={self.peak_bytes}, by_device={self.by_device})"

    def __enter__(self) -> PeakMemory:
        if self._open:
            raise RuntimeError("this peak_memory() measures, and cannot be entered inside itself: make another one")
        self._meters = {}
        for device in self._devices:
            meter: _Meter = _AllocatorMeter(device.index) if device.type == "cuda" else StorageLedger(device)
            meter.__enter__()
            self._meters[str(device)] = meter
        self._open = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open = False
        for meter in reversed(self._meters.values()):
            meter.__exit__(*exc_info)


def peak_memory(device: torch.device | str | int | None = None) -> PeakMemory:
    """Measure the peak memory of a block of code.

    On CUDA, the figure is the allocator's peak in the block minus what was allocated at entry. The
    allocator's peak statistic is reset.

    On the CPU and other accelerators, it is the largest number of bytes of tensor storages that were allocated
    since entry and alive at the same time. Each storage counts once, however many views it has, with its size
    at the moment
    (`resize_`, also of the storage itself, is followed), from the operation that returns it until it dies;
    sparse tensors count with their indices and values. Tensors that autograd saves, gradients, and all that
    backward allocates are seen. These are not: buffers inside a single operation's kernel; what is made without
    an operation (a `torch.UntypedStorage`, storages from files, the states of random generators); other threads;
    code compiled by `torch.compile`. Storages from before the entry count only with the bytes by which they
    grow, and their death takes nothing off.

    Counting costs tens of microseconds per operation, and changes no result. It can change one
    allocation: under any dispatch mode autograd sums the gradients of a tensor with several uses into a new
    tensor, where otherwise it may reuse one of them, so the figure can be one such gradient too high.

    Args:
        device: The device to measure: "cpu", "cuda", "cuda:1", another accelerator that torch finds, a
            `torch.device`, or a CUDA device's number. `None` measures the CPU and the accelerators, of CUDA every
            visible one; `peak_bytes` is the sum of their peaks.

    Returns:
        A context manager with `peak_bytes` and `current_bytes` (during and after the block) and `by_device`.

    Raises:
        ValueError: The device is neither the CPU nor an accelerator that is there.
        RuntimeError: A CUDA device is asked for and there is none with this number.

    Example:
        >>> import torch
        >>> from recollect.memory import peak_memory
        >>> layers = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(8)])
        >>> x = torch.randn(1000, requires_grad=True)
        >>> with peak_memory("cpu") as memory:
        ...     y = layers(x)
        >>> memory.peak_bytes  # autograd keeps each output
        32000
    """
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.accelerator.current_accelerator(check_available=True)
    others = [torch.device(found.type)] if found is not None and found.type != "cuda" else []
    if device is None:
        return PeakMemory([torch.device("cpu"), *(torch.device("cuda", i) for i in range(cuda_devices)), *others])
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cpu":
        return PeakMemory([torch.device("cpu")])
    if device.type in [other.type for other in others]:
        return PeakMemory([device])
    if device.type != "cuda":
        raise ValueError(
            f"peak_memory() got the device {str(device)!r}: it measures 'cpu' and 'cuda' devices, and another "
            "accelerator where torch.accelerator finds one"
        )
    index = device.index
    if cuda_devices and index is None:
        index = torch.cuda.current_device()
    if index is None or index >= cuda_devices:
        raise RuntimeError(
            f"peak_memory() got the device {str(device)!r}, but {cuda_devices} CUDA devices are visible: "
            "name one of them, or 'cpu'"
        )
    return PeakMemory([torch.device("cuda", index)])


def tensor_bytes(*objects: Any, gradients: bool = False) -> int:
    """Count the bytes of the distinct storages behind tensors, wherever they are.

    Args:
        *objects: Tensors, storages, modules (parameters and buffers), optimizers (parameters and state), and
            nested mappings or iterables of these. Numbers, strings and None have no bytes.
        gradients: Also count the `.grad` of the tensors found.

    Returns:
        Bytes, on all devices together. A storage that several tensors share counts once and in full.

    Raises:
        TypeError: An object is none of the above.

    Example:
        >>> import torch
        >>> from recollect.memory import tensor_bytes
        >>> layer = torch.nn.Linear(10, 5)
        >>> tensor_bytes(layer), tensor_bytes(layer, layer.weight[0])  # a view of what is counted
        (220, 220)
    """
    seen: dict[int, UntypedStorage] = {}  # holds the storages: a freed one's key could come again
    with torch.no_grad():
        for tensor in tensors_in(objects):
            if isinstance(tensor, UntypedStorage):
                seen[tensor._cdata] = tensor
                continue
            grad = tensor.grad if gradients and tensor.is_leaf else None
            for owner in (tensor,) if grad is None else (tensor, grad):
                seen.update((storage._cdata, storage) for storage in storages_of(owner))
    return sum(storage.nbytes() for storage in seen.values())
