"""Tensors that a source keeps, through whatever saved-tensor hooks surround it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.frames._describe import describe
from recollect.frames._errors import InPlaceError
from recollect.frames._modules import version_of

__all__ = ["Kept", "KeptArguments", "devices_of", "laid_out", "storage_of"]


class Kept:
    """One tensor, kept the way autograd would keep it here.

    Inside another frame it becomes one of that frame's saved tensors and is dropped with them; inside
    ``torch.autograd.graph.save_on_cpu`` it goes to host memory.

    Args:
        tensor: any tensor. Its history is not kept.
    """

    __slots__ = ("_packed", "_requires_grad", "_unpack", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._requires_grad = tensor.requires_grad
        self._version = version_of(tensor)
        self._unpack: Callable[[Any], Tensor] | None = None
        # A tensor without history is kept as the object it is, for those who cache by identity.
        bare = tensor.detach() if tensor.requires_grad else tensor
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:
            self._packed: Any = bare
        else:
            with torch.no_grad():
                self._packed = hooks[0](bare)
            self._unpack = hooks[1]

    @property
    def packed(self) -> bool:
        """Whether hooks hold the tensor, so that each :meth:`get` costs something."""
        return self._unpack is not None

    def get(self, function: Callable[..., Any], role: str) -> Tensor:
        """Return the tensor, without history and with the forward's ``requires_grad``.

        Raises:
            InPlaceError: it was changed in place since; the message names ``function`` and ``role``.
        """
        if self._unpack is not None:
            tensor = self._unpack(self._packed)
        else:
            tensor = self._packed
            if version_of(tensor) != self._version:
                raise InPlaceError(
                    f"{describe(function)}: its {role} of shape {list(tensor.shape)} was changed in place "
                    f"between the forward pass (version {self._version}) and backward (version {version_of(tensor)}); "
                    "change a copy instead (x = x + 1, not x += 1)"
                )
        return tensor.detach().requires_grad_() if self._requires_grad else tensor


class KeptArguments:
    """A region's arguments: tensors (also within lists, tuples and dicts) kept, everything else by reference.

    Arguments that are one tensor are one tensor again when they come back: modules ask (``query is key``).

    Args:
        args: positional arguments.
        skip: positions of arguments that another source will bring; ``None`` stands for them.
    """

    __slots__ = ("_args",)

    def __init__(self, args: tuple[Any, ...], skip: frozenset[int] = frozenset()) -> None:
        kept: dict[int, Kept] = {}

        def keep(tensor: Tensor) -> Kept:
            if id(tensor) not in kept:
                kept[id(tensor)] = Kept(tensor)
            return kept[id(tensor)]

        self._args = [None if i in skip else _map(Tensor, keep, arg) for i, arg in enumerate(args)]

    def get(self, function: Callable[..., Any]) -> list[Any]:
        """Return the arguments again; see :meth:`Kept.get`."""
        tensors: dict[int, Tensor] = {}

        def get(kept: Kept) -> Tensor:
            if id(kept) not in tensors:
                tensors[id(kept)] = kept.get(function, "input")
            return tensors[id(kept)]

        return [_map(Kept, get, arg) for arg in self._args]


def _map(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Replace every ``kind`` in nested lists, tuples and dicts; containers without one come back as they are.

    Not torch.utils._pytree, whose recursive helpers leave reference cycles for the garbage collector.
    """
    if isinstance(value, kind):
        return change(value)
    if type(value) is dict:
        mapped = {key: _map(kind, change, item) for key, item in value.items()}
        return mapped if any(mapped[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [_map(kind, change, item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def devices_of(args: tuple[Any, ...]) -> set[torch.device]:
    """Return the devices of all tensors among the arguments."""
    devices = set()

    def note(tensor: Tensor) -> Tensor:
        devices.add(tensor.device)
        return tensor

    _map(Tensor, note, args)
    return devices


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share their memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def laid_out(tensor: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the values with the forward's strides and dtype, which compiled blocks and autograd go by.

    Expanded layouts (elements that share memory) cannot be written to; they stay dense.
    """
    with torch.no_grad():
        tensor = tensor.to(dtype)
        if tensor.stride() == strides or 0 in strides:
            return tensor
        return torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor)
