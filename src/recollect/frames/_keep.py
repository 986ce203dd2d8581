"""Tensors that a source keeps, through whatever saved-tensor hooks surround it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from recollect.frames._describe import describe
from recollect.frames._errors import InPlaceError
from recollect.frames._modules import version_of

__all__ = ["Kept", "KeptArguments", "devices_of"]


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

    Args:
        args: positional arguments.
        skip: positions of arguments that another source will bring; ``None`` stands for them.
    """

    __slots__ = ("_leaves", "_spec")

    def __init__(self, args: tuple[Any, ...], skip: frozenset[int] = frozenset()) -> None:
        leaves, self._spec = _flatten(tuple(None if i in skip else a for i, a in enumerate(args)))
        self._leaves = [Kept(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def get(self, function: Callable[..., Any]) -> list[Any]:
        """Return the arguments again; see :meth:`Kept.get`."""
        leaves = [leaf.get(function, "input") if isinstance(leaf, Kept) else leaf for leaf in self._leaves]
        return list(tree_unflatten(leaves, self._spec))


def _flatten(args: tuple[Any, ...]) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(args)


def devices_of(args: tuple[Any, ...]) -> set[torch.device]:
    """Return the devices of all tensors among the arguments."""
    return {leaf.device for leaf in _flatten(args)[0] if isinstance(leaf, Tensor)}
