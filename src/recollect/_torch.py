"""What recollect uses of torch's private interface, in one place.

Everything else in the package keeps to what torch documents. "Since" is the first release in which the name has the
form that is used here; the package asks for torch 2.9.

============================================================ ========================================= =====
used                                                         for                                       since
============================================================ ========================================= =====
``torch._C._autograd._top_saved_tensors_default_hooks``      what surrounds a frame                    2.5
``torch._C._autograd._saved_tensors_hooks_is_enabled``       whether frames can act                    2.1
``torch._C._functorch.peek_interpreter_stack``               whether torch.func is at work             2.0
``torch._C._functorch.is_functorch_wrapped_tensor``          whether a tensor is one of a transform's  2.1
``torch._functorch.pyfunctorch.temporarily_clear_...``       rebuilds in batched backward              2.0
``torch._C._vmapmode_{in,de}crement_nesting``                the same                                  1.8
``torch.autograd.forward_ad._current_level``                 whether forward mode is at work           1.8
``torch._C._get_tracing_state``                              whether torch.jit traces                  1.0
``torch._C._get_dispatch_mode``                              whether tensors are fake or proxies       2.1
``torch._C._current_graph_task_id``                          telling backward passes apart             1.13
``torch.autograd.variable.Variable._execution_engine``       a callback when backward ends             1.0
``torch.autograd._get_sequence_nr``, ``Node._sequence_nr``   which nodes a region made                 2.1
``..grad_mode._unsafe_preserve_version_counter``             writes that are undone                    2.0
``torch._C._EnableTorchFunction``,                           subclasses in a rebuild                   2.0
``_is_torch_function_enabled``
``torch._C.DisableTorchFunctionSubclass``                    what subclasses are underneath            2.0
``torch._subclasses.FakeTensor``                             whether a tensor has values               2.0
``torch._C._storage_Use_Count``, ``Tensor._use_count``       eager_release                             2.1
``torch._C._get_privateuse1_backend_name``                   autocast of devices that are added         2.1
``torch._C._len_torch_function_stack``                       whether a default device is set           2.1
``torch._dynamo.convert_frame.FRAME_COUNTER``                whether anything was compiled             2.1
``torch.nn.modules.module._global_forward_[pre_]hooks``      which modules run, and what they return   2.0
``torch.nn.utils.parametrize._cache``, ``_cache_enabled``    parametrize.cached in a rebuild           1.9
``torch._C._get_*_sdp_enabled``, ``_get_sdp_priority_order`` sdpa_kernel in a rebuild                  2.5
``torch.utils._python_dispatch.TorchDispatchMode``           what a region reads and writes            1.13
``torch.utils._pytree.SUPPORTED_NODES``                      containers that others registered         1.8
``..fsdp._fully_shard``: ``RegisterPostBackwardFunction``,   an engine of sharded parameters           2.9
``_get_fsdp_state``, ``reshard_after_backward``
``_CachedTorchDispatchMode.storage``                         selective checkpoints, more than once     2.13
``torch._C._SetExcludeDispatchKeyGuard``                     versions of what a dispatch mode keeps     1.13
============================================================ ========================================= =====
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.variable import Variable
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize as _parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.checkpoint import _CachedTorchDispatchMode

_Function = TypeVar("_Function", bound=Callable[..., Any])

__all__ = [
    "ScaledProductBackends",
    "TorchDispatchMode",
    "cached_parametrizations",
    "compiled_blocks_exist",
    "counted_alias",
    "default_device",
    "enabled_overrides",
    "graph_task_id",
    "has_global_hooks",
    "hooks_are_enabled",
    "is_batched",
    "is_fake",
    "is_faked",
    "is_in_transform",
    "is_recorded",
    "is_stand_in",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "modes_are_open",
    "node_sequence",
    "opened_by_pytree",
    "outputs_come_first_hand",
    "outside_functorch",
    "outside_modes",
    "outside_transforms",
    "overrides_are_enabled",
    "parametrizations_as",
    "preserving_versions",
    "saved_tensor_hooks",
    "selective_storage",
    "sequence",
    "shape_of",
    "stands_in",
    "storage_use_count",
    "tensor_use_count",
    "transform_level_is_open",
    "uncompiled",
    "unwatch_leaving",
    "unwatch_modules",
    "unwatch_outputs",
    "watch_leaving",
    "watch_modules",
    "watch_outputs",
    "when_backward_ends",
    "with_signature",
    "without_overrides",
    "write_undeclared",
]


# Saved tensors, transforms and recordings.


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the innermost saved-tensor hooks that surround this code, if any."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def hooks_are_enabled() -> bool:
    """Return whether saved-tensor hooks may be used here."""
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return enabled


def transform_level_is_open() -> bool:
    """Return whether a transform of torch.func is at work here."""
    return _functorch.peek_interpreter_stack() is not None


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func that is at work."""
    wrapped: bool = _functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def is_in_transform() -> bool:
    """Return whether saved-tensor hooks do not exist here: in torch.func, forward mode and under torch.jit.trace."""
    return (
        _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_recorded() -> bool:
    """Return whether this runs under torch.func, or is compiled or traced: tensors are then not what they seem."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transform_level_is_open():
        return True
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.FUNCTIONAL, modes.PROXY))


def is_batched() -> bool:
    """Return whether this runs under vmap or another transform of torch.func."""
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting() > 0 or transform_level_is_open()


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave batched-gradient (vmap) modes for the duration of a rebuild.

    ``is_grads_batched=True`` runs backward under a vmap level that refuses random operations, although what a rebuild
    computes has no batch of gradients in it.
    """
    decrement: Callable[[], int] = torch._C._vmapmode_decrement_nesting
    increment: Callable[[], int] = torch._C._vmapmode_increment_nesting
    increment()
    levels = decrement()
    for _ in range(levels):
        decrement()
    try:
        with outside_functorch() if transform_level_is_open() else nullcontext():
            yield
    finally:
        for _ in range(levels):
            increment()


def outside_functorch() -> AbstractContextManager[Any]:
    """Return a context without transforms of torch.func: tensors that are made there belong to none."""
    if not transform_level_is_open():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # takes long to import

    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context


def with_signature(forward: _Function) -> _Function:
    """Let a function hold its signature, which torch asks for in every call of a ``Function`` with a ``setup_context``.

    To find it out takes longer than to multiply a small matrix.
    """
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def enabled_overrides() -> AbstractContextManager[Any]:
    """Return a context in which subclasses override operations (``__torch_function__``).

    A backward that starts from a tensor of a subclass runs with that switched off, and a rebuild in it would too.
    """
    context: AbstractContextManager[Any] = torch._C._EnableTorchFunction()
    return context


def overrides_are_enabled() -> bool:
    """Return whether subclasses override operations here."""
    enabled: bool = torch._C._is_torch_function_enabled()
    return enabled


def without_overrides() -> AbstractContextManager[Any]:
    """Return a context in which subclasses do not override operations: they are plain tensors there."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


Autocast = list[tuple[str, bool, torch.dtype]]
"""Kinds of devices, whether autocast is on for them, and in which type."""


def autocast_now(kinds: Iterable[str] | None = None) -> Autocast:
    """Return autocast as it is now for these kinds of devices, or for all that there may be."""
    if kinds is None:
        every = ["cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", torch._C._get_privateuse1_backend_name()]
        kinds = filter(torch.amp.is_autocast_available, every)
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextmanager
def autocast_as(then: Autocast) -> Iterator[None]:
    """Let autocast be as it was then in the body, with a cache of its own: casts are handed to no other forward."""
    with ExitStack() as stack:
        for kind, enabled, dtype in then:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
        yield


def modes_are_open() -> bool:
    """Return whether a dispatch mode is open here."""
    number: int = torch._C._len_torch_dispatch_stack()
    return number > 0


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context without dispatch modes, for what recollect does for itself: fake tensors are no states."""
    return _disable_current_modes() if modes_are_open() else nullcontext()


def is_faked() -> bool:
    """Return whether tensors have no values here (FakeTensorMode, torch.export)."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor stands for one and has no values itself."""
    return isinstance(tensor, FakeTensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """Return a tensor's shape; of a strided nested one, which has none, the sizes of all parts in a row."""
    if tensor.is_nested and tensor.layout is torch.strided:
        return torch.Size(tensor._nested_tensor_size().flatten().tolist())
    return tensor.shape


# The graph.


def sequence() -> int:
    """Return the number that the next node of this thread's graph will have; it only grows."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def node_sequence(node: Any) -> int:
    """Return the number of a node; nodes that accumulate gradients have the largest there is."""
    number: int = node._sequence_nr()
    return number


def graph_task_id() -> int:
    """Return which backward pass this is."""
    number: int = torch._C._current_graph_task_id()
    return number


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Call ``callback`` at the end of the backward pass that is running."""
    Variable._execution_engine.queue_callback(callback)


# Storages and versions.


def preserving_versions(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which writes to the tensors do not count: they are undone before it ends."""
    if not tensors:
        return nullcontext()
    preserving: AbstractContextManager[Any] = _unsafe_preserve_version_counter(tuple(tensors))
    return preserving


def counted_alias(tensor: Tensor) -> Tensor:
    """Return a tensor without history, on the same memory and with the same version, also in a dispatch mode."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def storage_use_count(storage: torch.UntypedStorage) -> int | None:
    """Return how many hold a storage, or ``None`` where torch does not say."""
    count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else count(storage._cdata)


def tensor_use_count(tensor: Tensor) -> int:
    """Return how many of torch's own references a tensor has."""
    held: int = tensor._use_count()  # type: ignore[attr-defined]
    return held


# Operations that write to arguments without declaring it in their schema: positions, and where the flag stands that
# says whether they do.
_UNDECLARED: dict[str, tuple[tuple[int, ...], int | None]] = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::batch_norm_update_stats": ((1, 2), None),
    "aten::batch_norm_gather_stats": ((3, 4), None),
    "aten::batch_norm_gather_stats_with_counts": ((3, 4), None),
}


def write_undeclared(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments that an operation writes to although its schema does not say so."""
    found = _UNDECLARED.get(func._schema.name)
    if found is None:
        return []
    positions, flag = found
    if flag is not None and not (flag < len(args) and args[flag]):
        return []
    return [args[i] for i in positions if i < len(args)]


# Modules that run.

_WATCHING = "recollect"  # torch's own handles are numbers
# The hooks below do nothing that could be done twice.
warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks on modules")
_lock = threading.Lock()
_watchers = 0
_leavers = 0


def watch_modules(enter: Callable[..., None]) -> None:
    """Call ``enter(module, args)`` before each module's forward.

    One hook for the process, until :func:`unwatch_modules` is called as often. Modules of other threads are seen too.
    """
    global _watchers
    with _lock:
        _watchers += 1
        if _watchers == 1:
            _module._global_forward_pre_hooks[_WATCHING] = enter  # type: ignore[index]


def unwatch_modules() -> None:
    """Undo one :func:`watch_modules`."""
    global _watchers
    with _lock:
        _watchers -= 1
        if _watchers == 0:
            del _module._global_forward_pre_hooks[_WATCHING]  # type: ignore[arg-type]


def watch_leaving(leave: Callable[..., None]) -> None:
    """Call ``leave(module, args, output)`` after each module's forward, also of one that was entered already."""
    global _leavers
    with _lock:
        _leavers += 1
        if _leavers == 1:
            _module._global_forward_hooks_always_called[_WATCHING] = True  # type: ignore[index]
            _module._global_forward_hooks[_WATCHING] = leave  # type: ignore[index]


def unwatch_leaving() -> None:
    """Undo one :func:`watch_leaving`."""
    global _leavers
    with _lock:
        _leavers -= 1
        if _leavers == 0:
            del _module._global_forward_hooks[_WATCHING]  # type: ignore[arg-type]
            del _module._global_forward_hooks_always_called[_WATCHING]  # type: ignore[arg-type]


_CAPTURING = "recollect.autogram"


def watch_outputs(hook: Callable[..., Any]) -> None:
    """Call ``hook(module, args, kwargs, output)`` right after each module's forward, before all other hooks.

    What it returns is the module's output, unless it is None. One hook for the process, until :func:`unwatch_outputs`;
    a module that runs at that moment may still call it, and without ``kwargs``.
    """
    hooks: Any = _module._global_forward_hooks
    _module._global_forward_hooks_with_kwargs[_CAPTURING] = True  # type: ignore[index]
    hooks[_CAPTURING] = hook
    hooks.move_to_end(_CAPTURING, last=False)


def unwatch_outputs() -> None:
    """Undo :func:`watch_outputs`."""
    hooks: Any = _module._global_forward_hooks
    hooks.pop(_CAPTURING, None)
    _module._global_forward_hooks_with_kwargs.pop(_CAPTURING, None)  # type: ignore[call-overload]


def outputs_come_first_hand() -> bool:
    """Return whether no hook of somebody else's, which may change outputs, comes before that of watch_outputs."""
    hooks: Any = _module._global_forward_hooks
    return next(iter(hooks), None) == _CAPTURING


def has_global_hooks(beside_engines: bool = False) -> bool:
    """Return whether hooks of somebody else, of engines too, run before or after every module's forward.

    Args:
        beside_engines: leave out those of engines, which change no numbers.
    """
    before: Any = _module._global_forward_pre_hooks
    after: Any = _module._global_forward_hooks
    own = (_WATCHING in after) + (beside_engines and _CAPTURING in after)
    return len(before) > (_WATCHING in before) or len(after) > own


STANDARD_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


def stands_in(forward: _Function) -> _Function:
    """Mark a function that stands in a module's ``forward`` while calls need it, of any thread.

    It is no state of the module: another thread may put it there or take it off at any time, and the module does the
    same with it and without.
    """
    forward.recollect_stands_in = True  # type: ignore[attr-defined]
    return forward


def is_stand_in(value: Any) -> bool:
    """Return whether a value is a method of a function that :func:`stands_in` has marked."""
    return isinstance(value, types.MethodType) and getattr(value.__func__, "recollect_stands_in", False) is True


# Contexts that torch keeps for the process.


def cached_parametrizations() -> dict[Any, Any] | None:
    """Return what ``torch.nn.utils.parametrize.cached`` holds here; ``None`` outside of it."""
    return dict(_parametrize._cache) if _parametrize._cache_enabled else None


@contextmanager
def parametrizations_as(cache: dict[Any, Any] | None) -> Iterator[None]:
    """Run the body inside ``parametrize.cached`` that holds ``cache``, or outside of it for ``None``."""
    before = _parametrize._cache_enabled, _parametrize._cache
    _parametrize._cache_enabled, _parametrize._cache = int(cache is not None), dict(cache or {})
    try:
        yield
    finally:
        _parametrize._cache_enabled, _parametrize._cache = before


def default_device() -> torch.device | None:
    """Return :func:`torch.get_default_device`; ``None`` where nobody has set any."""
    # A default device is a mode on this stack; torch lists and searches it each time.
    if torch._C._len_torch_function_stack() == 0:
        return None
    return torch.get_default_device()


def compiled_blocks_exist() -> bool:
    """Return whether torch.compile has compiled anything in this process."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    return compiler is not None and compiler.FRAME_COUNTER > 0


def uncompiled() -> AbstractContextManager[Any]:
    """Return what lets compiled functions run as they were written, until its ``__exit__`` is called.

    Under a dispatch mode they do anyway, but torch notes that for good, and never runs compiled code of them again.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class ScaledProductBackends:
    """Which implementations of scaled_dot_product_attention are allowed at this moment, and in which order."""

    _NAMES = tuple(
        name
        for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
        if hasattr(torch._C, f"_get_{name}_sdp_enabled") and hasattr(torch._C, f"_set_sdp_use_{name}")
    )
    _GETTERS = tuple(getattr(torch._C, f"_get_{name}_sdp_enabled") for name in _NAMES)
    _SETTERS = tuple(getattr(torch._C, f"_set_sdp_use_{name}") for name in _NAMES)

    __slots__ = ("_enabled", "_order")

    def __init__(self) -> None:
        self._enabled = [getter() for getter in self._GETTERS]
        self._order: list[int] = torch._C._get_sdp_priority_order()

    def hold(self) -> bool:
        """Return whether these are allowed now, in this order."""
        enabled = [getter() for getter in self._GETTERS]
        return enabled == self._enabled and torch._C._get_sdp_priority_order() == self._order

    def set(self) -> None:
        """Allow these again."""
        for setter, enabled in zip(self._SETTERS, self._enabled, strict=True):
            setter(enabled)
        torch._C._set_sdp_priority_order(self._order)


def selective_storage(context: Any) -> dict[Any, Any] | None:
    """Return where a context of torch's selective checkpoints keeps what it saved; ``None`` for other contexts."""
    storage = getattr(context, "storage", None)  # a dict since torch 2.13
    return storage if isinstance(context, _CachedTorchDispatchMode) and isinstance(storage, dict) else None


def opened_by_pytree(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return the children of a container that was registered with torch's pytree, and how it is made of them."""
    node = _pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    children, context = node.flatten_fn(value)
    unflatten = node.unflatten_fn
    return list(children), lambda items: unflatten(items, context)


def hooks_of_sharding() -> list[type[torch.autograd.Function]]:
    """Return the functions that fully_shard puts in front of modules to see when their backward is over."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

    return [RegisterPostBackwardFunction]


def reshards_after_backward(module: Any) -> bool:
    """Return what was set by ``FSDPModule.set_reshard_after_backward``."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # since 2.13; one before
    found = [state._fsdp_param_group] if groups is None else groups
    return all(group.reshard_after_backward for group in found if group is not None)
