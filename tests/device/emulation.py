"""A second device on the CPU: where tensors are made, and where the host waits for a value.

Tensors on "other" are torch's own, with storages, strides and versions; their memory is the host's, under another
label. Each operation takes the label off, runs on the CPU, and puts it on again, so values are those of the CPU.
Tensors of the CPU are refused beside them (but for numbers of no dimension), and what a real device would have to be
waited for is counted: see :func:`watch`.

Copies to the host that do not block arrive late: an event that was recorded after them is over when it has been asked
``device.lag`` times, or when the host has waited for something later. Until then the copy holds NaN.

Not emulated: sparse COO tensors, pinned memory and streams of one's own, storages that are made or resized by hand,
``torch.Generator("other")``. An error that a hook of a tensor, or of a saved tensor, raises on the device ends the
process: torch asks the device, which is in Python, for its type while the error is on its way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyDeviceGuard,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

__all__ = ["NAME", "Log", "device", "install", "watch"]

NAME = "other"
_aten = torch.ops.aten
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CSR_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.SparseCsrCPU)
_FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# What is counted.


class Log:
    """How often the host waited, and for what.

    Attributes:
        syncs: how often it waited for a value of the device.
        copies: how many copies to the host did not block.
        where: of each wait, the operation and the innermost lines of the library.
        sent: the same of each copy to the device that blocks: from memory that is not pinned, as here all is, it waits
            for its stream. `torch.tensor(values, device=...)` is one.
    """

    def __init__(self) -> None:
        self.syncs = self.copies = 0
        self.where: list[str] = []
        self.sent: list[str] = []


_logs: list[Log] = []


def _lines() -> str:
    frames = [f for f in traceback.extract_stack() if "/recollect/" in f.filename]
    return " ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in frames[-4:]) or "outside of the library"


def _waited(name: str) -> None:
    device.catch_up()
    if device.sync_debug_mode == "warn":
        warnings.warn(f"called a synchronizing operation of the device: {name}", stacklevel=2)
    for log in _logs:
        log.syncs += 1
        log.where.append(f"{name} at {_lines()}")


def _sent() -> None:
    for log in _logs:
        log.sent.append(f"copy to the device at {_lines()}")


@contextlib.contextmanager
def watch() -> Iterator[Log]:
    """Count in the body how often the host waits for the device, in all threads."""
    log = Log()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


# Operations that wait on a real device. Others that do are made of these (masks of nonzero, error checks of scalars).
_WAITING = {
    "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc",
    "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "_linalg_svd", "linalg_lstsq", "_to_sparse", "_to_sparse_csr",
}  # fmt: skip


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _WAITING:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and (len(args) < 4 or args[3] is None)
    if name == "_index_put_impl_":  # a mask is turned into places, unless there is one value to write
        return args[2].numel() != 1 and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return False


# Labels.

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_ON_CPU, _EXTENSION = 1, 12  # the kinds of devices in DLPack


def _labelled(tensor: Tensor, kind: int) -> Tensor:
    """Return a strided tensor on the same memory, under the label of a kind of device."""
    capsule = torch._C._to_dlpack(tensor)
    label = ctypes.c_int32 * 2
    start = _pointer(capsule, b"dltensor")
    label.from_address(start + ctypes.sizeof(ctypes.c_void_p))[:] = [kind, 0]
    return torch._C._from_dlpack(capsule)


def _off(tensor: Tensor) -> Tensor:
    """Return the CPU's view of a tensor of the device."""
    if tensor.layout is torch.sparse_csr:
        rows, columns, values = map(_off, (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
        return torch.sparse_csr_tensor(rows, columns, values, tensor.shape, check_invariants=False)
    if tensor.numel() == 0:  # an output that is going to be resized
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    negative = tensor.is_neg()
    plain = _aten.alias.default(tensor)
    cpu = _labelled(torch._neg_view(plain) if negative else plain, _ON_CPU)
    return torch._neg_view(cpu) if negative else cpu


def _on(tensor: Tensor) -> Tensor:
    """Return a tensor of the device on the memory of one of the CPU."""
    if tensor.dtype is torch.float64 and not device.has_float64:
        raise TypeError(f"{NAME} has no float64")
    if tensor.layout is torch.sparse_csr:
        parts = tensor.crow_indices(), tensor.col_indices(), tensor.values()
        rowptr, col, value = map(_on, parts)
        return torch.sparse_csr_tensor(rowptr, col, value, tensor.shape, check_invariants=False)
    return _labelled(tensor.resolve_neg().resolve_conj(), _EXTENSION)


def _is_other(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


# Operations.


# What looks at sizes, or takes sparse tensors apart, and reads no memory: the CPU's kernels do it for any device.
_LOOKING = {
    "PrivateUse1": (_CPU_KEY, (
        "as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "set_.source_Storage",
        "set_.source_Storage_storage_offset", "set_.source_Tensor",
    )),
    "SparseCsrPrivateUse1": (_CSR_KEY, ("crow_indices", "col_indices", "values", "_nnz", "sparse_dim", "dense_dim")),
}  # fmt: skip


class _Found:
    """The tensors of the device in a call, and what they are on the CPU."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def off(self, value: Any) -> Any:
        if not _is_other(value):
            return _CPU if isinstance(value, torch.device) and value.type == NAME else value
        for other, cpu in self.pairs:
            if other is value:
                return cpu
        cpu = _off(value)
        self.pairs.append((value, cpu))
        return cpu

    def on(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        for other, cpu in self.pairs:
            if cpu is value:
                return self._same(other, cpu)
        for other, cpu in self.pairs:
            if _share(cpu, value):  # a view of an argument
                offset = other.storage_offset() + value.storage_offset()
                return _aten.as_strided.default.redispatch(_CPU_KEY, other, value.shape, value.stride(), offset)
        return _on(value)

    def _same(self, other: Tensor, cpu: Tensor) -> Tensor:
        if other.layout is torch.strided and other.shape != cpu.shape:  # it was resized
            storage = _on(cpu).untyped_storage()
            _aten.set_.source_Storage_storage_offset.redispatch(_CPU_KEY, other, storage, 0, cpu.shape, cpu.stride())
        return other


_CPU = torch.device("cpu")


def _share(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided or a.dtype != b.dtype or not b.numel():
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _as_tensor(value: Any) -> Any:
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value) if isinstance(value, (int, complex)) else value


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op._schema.name.removeprefix("aten::")
    if _waits(name, args, kwargs):
        _waited(name)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    strangers = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]
    if strangers and any(map(_is_other, tensors)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got tensors on {NAME} and on the CPU, the "
            f"latter of shape {list(strangers[0].shape)}"
        )
    # Numbers that stand for tensors come as numbers.
    kinds = [isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments]
    args = tuple(_as_tensor(a) if k else a for a, k in zip(args, kinds, strict=False))
    found = _Found()
    wanted = kwargs.get("device")
    here = torch.device(wanted).type == NAME if wanted is not None else any(map(_is_other, tensors))
    kwargs.pop("pin_memory", None)
    inside, named = tree_map(found.off, (args, kwargs))
    replaced = _REPLACED.get(name, op)
    with device.drawing() if torch.Tag.nondeterministic_seeded in op.tags else contextlib.nullcontext():
        result = replaced(*inside, **named)
    result = tree_map(found.on, result) if here else result
    for other, cpu in found.pairs:
        found._same(other, cpu)
    return result


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, mask: Any,
) -> Any:  # fmt: skip
    channels = weight.size(1) * groups if transposed else weight.size(0)
    return _aten.convolution_backward(
        grad, x, weight, [channels], stride, padding, dilation, transposed, output_padding, groups, mask
    )


def _lstm_cell(given: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    gates = sum((bias for bias in biases if bias is not None), given + hidden)
    i, f, g, o = gates.chunk(4, 1)
    work = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
    i, f, g, o = work.chunk(4, 1)
    after = f * cell + i * g
    return o * after.tanh(), after, work


def _lstm_cell_backward(
    grad_hidden: Tensor | None, grad_after: Tensor | None, cell: Tensor, after: Tensor, work: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    i, f, g, o = work.chunk(4, 1)
    grad_hidden = torch.zeros_like(cell) if grad_hidden is None else grad_hidden
    grad = grad_hidden * o * (1 - after.tanh() ** 2) + (0 if grad_after is None else grad_after)
    gates = torch.cat(
        [
            grad * g * i * (1 - i), grad * cell * f * (1 - f), grad * i * (1 - g**2),
            grad_hidden * after.tanh() * o * (1 - o),
        ], 1,
    )  # fmt: skip
    return gates, grad * f, gates.sum(0) if has_bias else None


def _gru_cell(given: Tensor, hidden: Tensor, before: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    given = given if biases[0] is None else given + biases[0]
    hidden = hidden if biases[1] is None else hidden + biases[1]
    (a, b, c), (d, e, f) = given.chunk(3, 1), hidden.chunk(3, 1)
    reset, update = (a + d).sigmoid(), (b + e).sigmoid()
    new = (c + reset * f).tanh()
    return new + update * (before - new), torch.cat([reset, update, new, before, f], 1)


def _gru_cell_backward(grad: Tensor, work: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    reset, update, new, before, f = work.chunk(5, 1)
    of_new = grad * (1 - update) * (1 - new**2)
    of_update = grad * (before - new) * update * (1 - update)
    of_reset = of_new * f * reset * (1 - reset)
    given, hidden = torch.cat([of_reset, of_update, of_new], 1), torch.cat([of_reset, of_update, of_new * reset], 1)
    biases = (given.sum(0), hidden.sum(0)) if has_bias else (None, None)
    return given, hidden, grad * update, *biases


# What torch asks of devices that are not its own, and what has no kernel on the CPU.
_REPLACED: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "convolution_overrideable": _aten.convolution.default,
    "convolution_backward_overrideable": _convolution_backward,
}


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if _is_other(target):
        if source.device.type == "cpu" and source.numel() and not non_blocking:
            _sent()
        _off(target).copy_(_off(source) if _is_other(source) else source)
    elif non_blocking:
        for log in _logs:
            log.copies += 1
        device.copy_later(target, _off(source).clone())
    else:
        _waited("copy_")
        target.copy_(_off(source))
    return target


def _to_copy(
    tensor: Tensor, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    non_blocking: bool = False, memory_format: Any = None,
) -> Tensor:  # fmt: skip
    device = tensor.device if device is None else torch.device(device)
    if tensor.layout is not torch.strided:
        if device.type == "cpu":
            _waited("_to_copy")
        elif tensor.device.type == "cpu" and not non_blocking:
            _sent()
        moved = _off(tensor).to(dtype=dtype, copy=True)
        return moved if device.type == "cpu" else _on(moved)
    target = torch.empty_like(tensor, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return target.copy_(tensor, non_blocking)


def _scalar(tensor: Tensor) -> Any:
    _waited("_local_scalar_dense")
    return _aten._local_scalar_dense(_off(tensor))


def _deepcopy(tensor: Tensor, original: Callable[..., Tensor], memo: dict[int, Any]) -> Tensor:
    """Copy without making a storage, which only a device of torch's own can."""
    if not _is_other(tensor) or not tensor.is_leaf:
        return original(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


# Autocast.

_LOW = (
    "linear", "mm", "matmul", "addmm", "addmv", "bmm", "baddbmm", "mv", "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "scaled_dot_product_attention", "prelu",
)  # fmt: skip
_FULL = (
    "softmax.int", "log_softmax.int", "layer_norm", "group_norm", "cross_entropy_loss", "nll_loss", "exp", "log",
    "log1p", "expm1", "pow.Tensor_Scalar", "rsqrt", "sum", "sum.dim_IntList", "cumsum", "norm.Scalar", "mse_loss",
    "softplus", "logsumexp", "prod", "binary_cross_entropy_with_logits",
)  # fmt: skip


def _casting(op: Any, full: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if full else torch.get_autocast_dtype(NAME)
        narrow = (torch.float16, torch.bfloat16) if full else (torch.float16, torch.bfloat16, torch.float32)

        def cast(value: Any) -> Any:
            return value.to(dtype) if _is_other(value) and value.dtype in narrow else value

        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C._parse_dispatch_key("AutocastPrivateUse1"))
        ):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


# The device, and torch's module for it.


class _Event:
    """A point in the order of what the device does."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._place, self._asked = 0, 0

    def record(self, stream: Any = None) -> None:
        """Note what was asked of the device until now."""
        self._place, self._asked = device.places, 0

    def query(self) -> bool:
        """Return whether the device has done it."""
        self._asked += 1
        if self._asked > device.lag:
            device.catch_up(self._place)
        return device.done >= self._place

    def synchronize(self) -> None:
        """Wait for it."""
        if device.done < self._place:
            _waited("Event.synchronize")


class _Device:
    """The state of the device.

    Attributes:
        lag: how often an event is asked before it is over.
        present: what ``torch.other.is_available()`` answers.
        has_float64: otherwise tensors of this type are refused, as mps does.
        sync_debug_mode: ``"warn"``: each wait is a warning, as in CUDA.
        places: how many copies to the host were begun, and ``done``, how many are over.
    """

    def __init__(self) -> None:
        self.lag = 1
        self.present = False
        self.has_float64 = True
        self.sync_debug_mode = "default"
        self.places = self.done = 0
        self._late: list[tuple[Tensor, Tensor]] = []
        self._state = torch.Generator().manual_seed(0).get_state()
        self._lock = threading.RLock()

    # Copies that do not block.

    def copy_later(self, target: Tensor, values: Tensor) -> None:
        with self._lock:
            if target.dtype in _FLOAT:
                target.fill_(torch.nan)
            self.places += 1
            self._late.append((target, values))

    def catch_up(self, place: int | None = None) -> None:
        """Let the device have done what it was asked until a place; ``None``: everything."""
        with self._lock:
            place = self.places if place is None else place
            while self.done < place:
                target, values = self._late.pop(0)
                target.copy_(values)
                self.done += 1

    # Random numbers.

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let operations of the CPU draw from the device's generator."""
        with self._lock:
            before = torch.default_generator.get_state()
            torch.default_generator.set_state(self._state)
            try:
                yield
            finally:
                self._state = torch.default_generator.get_state()
                torch.default_generator.set_state(before)

    # What torch's module of a device has.

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self._state.clone()

    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        self._state = new_state.clone()

    def get_rng_state_all(self) -> list[Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, new_states: list[Tensor]) -> None:
        self.set_rng_state(new_states[0])

    def manual_seed(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    manual_seed_all = manual_seed

    def set_sync_debug_mode(self, debug_mode: str) -> None:
        self.sync_debug_mode = debug_mode

    def is_available(self) -> bool:
        return self.present

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        return None

    def synchronize(self, device: Any = None) -> None:
        _waited("synchronize")

    def current_stream(self, device: Any = None) -> None:
        return None  # there is one

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    Event = _Event

    class device(contextlib.nullcontext):  # noqa: N801
        """Makes a device the current one: there is one."""


device = _Device()


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return device.present


_libraries: list[torch.library.Library] = []


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


def install() -> None:
    """Register the device with torch, once in a process, and before its first backward pass."""
    if _libraries:
        return
    if torch._C._get_privateuse1_backend_name() != "privateuseone":
        raise RuntimeError("another device has taken the place that torch has for one more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _register()


def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, device, _Hook(), _DummyDeviceGuard())
    everything = torch.library.Library("_", "IMPL")
    for key in ("PrivateUse1", "SparseCsrPrivateUse1"):
        everything.fallback(_run, key)
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for place, (key, names) in _LOOKING.items():
        for name in names:
            aten.impl(name, functools.partial(_overload(name).redispatch, key), place)
    for name in _REPLACED:
        aten.impl(name, functools.partial(_run, _overload(name)), "PrivateUse1")
    # Torch would give its kernel an output of the result's size, of which the CPU's makes another one meanwhile.
    aten.impl("mse_loss", functools.partial(_run, _overload("mse_loss")), "PrivateUse1")
    for name in ("mm", "addmm", "clone"):  # torch would make their results sparse, and copy into one by parts
        aten.impl(name, functools.partial(_run, _overload(name)), "SparseCsrPrivateUse1")
    aten.impl("copy_", _copy, "PrivateUse1")
    for key in ("PrivateUse1", "SparseCsrPrivateUse1"):
        aten.impl("_to_copy", _to_copy, key)
    aten.impl("_local_scalar_dense", _scalar, "PrivateUse1")
    for names, full in ((_LOW, False), (_FULL, True)):
        for name in names:
            aten.impl(name, _casting(_overload(name), full), "AutocastPrivateUse1")
    deepcopy = functools.partialmethod(_deepcopy, torch.Tensor.__deepcopy__)
    torch.Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]
    _libraries.extend([everything, aten])
