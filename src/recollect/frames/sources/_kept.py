"""Inputs that are kept, through whatever saved-tensor hooks surround them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recollect._storages import storages_of
from recollect._torch import saved_tensor_hooks
from recollect._util._tree import Tree
from recollect.frames._errors import InPlaceError, describe
from recollect.frames._modes import local
from recollect.frames._watch import attributes_of, key_of, version_of
from recollect.frames.sources._source import Arguments, Held, Source

__all__ = ["Kept", "KeptArguments", "KeptTensor", "Layout", "storage_of", "unchanged"]


class KeptTensor:
    """One tensor, kept the way autograd would keep it here.

    Inside another frame it becomes one of that frame's saved tensors and is dropped with them; inside
    ``torch.autograd.graph.save_on_cpu`` it goes to host memory.

    Args:
        tensor: any tensor. Its history is not kept.
    """

    __slots__ = ("_attributes", "_packed", "_requires_grad", "_unpack", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._requires_grad = tensor.requires_grad
        self._version = version_of(tensor)
        self._attributes = attributes_of(tensor) if self._requires_grad else None
        self._unpack: Callable[[Any], Tensor] | None = None
        # A tensor without history is kept as the object it is, for those who cache by identity, and a parameter too.
        if type(tensor) is not Tensor and isinstance(tensor, nn.Parameter):
            self._requires_grad = False
        bare = tensor.detach() if self._requires_grad else tensor
        hooks = saved_tensor_hooks()
        if hooks is None:
            self._packed: Any = bare
        else:
            local.keeping += 1
            try:
                if getattr(hooks[0], "__module__", None) == "recollect.frames._frame":  # which computes nothing with it
                    self._packed = hooks[0](bare)
                else:
                    with torch.no_grad():
                        self._packed = hooks[0](bare)
            finally:
                local.keeping -= 1
            self._unpack = hooks[1]

    @property
    def packed(self) -> bool:
        """Whether hooks hold the tensor, so that each :meth:`get` costs something."""
        return self._unpack is not None

    def get(
        self, function: Callable[..., Any] | None, role: str, changed: list[tuple[str, Tensor, int]] | None = None
    ) -> Tensor:
        """Return the tensor, without history and with the forward's ``requires_grad``.

        Args:
            function: for messages.
            role: for messages.
            changed: takes note of the tensor if it was changed in place since, for who can tell whether it is read.

        Raises:
            InPlaceError: it was changed in place since, and there is no ``changed``; the message names ``function``.
        """
        if self._unpack is not None:
            tensor = self._unpack(self._packed)
        else:
            tensor = self._packed
            if version_of(tensor) != self._version and changed is not None:
                changed.append((f"its {role}", tensor, self._version))
            elif version_of(tensor) != self._version:
                raise _changed_in_place(function, f"its {role}", tensor, self._version)
        if not self._requires_grad:
            return tensor
        fresh = tensor.detach().requires_grad_()
        if self._attributes:
            fresh.__dict__.update(self._attributes)
        return fresh


def _changed_in_place(function: Callable[..., Any] | None, what: str, tensor: Tensor, version: int) -> InPlaceError:
    whose = f"{describe(function)}: {what}" if function is not None else what
    return InPlaceError(
        f"{whose} of shape {list(tensor.shape)} was changed in place between the forward pass (version {version}) and "
        f"backward (version {version_of(tensor)}); change a copy instead (x = x + 1, not x += 1)"
    )


def unchanged(held: Held, function: Callable[..., Any]) -> Arguments:
    """Return what was held of a call.

    Raises:
        InPlaceError: an argument was changed in place since; the message names ``function``.
    """
    arguments = held.inputs()
    for what, tensor, version in held.changed():
        raise _changed_in_place(function, what, tensor, version)
    return arguments


class KeptArguments:
    """The arguments of a call, in whatever containers: tensors kept, everything else by reference.

    Arguments that are one tensor are one tensor again when they come back: modules ask (``query is key``). Containers
    are made anew each time: a region may change them.

    Args:
        arguments: positional and keyword arguments.
        skip: positions of positional arguments that another source will bring; ``None`` stands for them.
    """

    __slots__ = ("_alone", "_tree")

    def __init__(self, arguments: Arguments, skip: frozenset[int] = frozenset()) -> None:
        args, kwargs = arguments
        self._alone: KeptTensor | None = None
        self._tree: Tree | None
        if len(args) == 1 and not kwargs and not skip and isinstance(args[0], Tensor):  # most calls
            self._alone = KeptTensor(args[0])
            return
        if not args and not kwargs:
            self._tree = None
            return
        if skip:
            args = tuple(None if i in skip else arg for i, arg in enumerate(args))
        self._tree = Tree((args, kwargs))
        self._tree.tensors = [KeptTensor(tensor) for tensor in self._tree.tensors]

    def get(
        self, function: Callable[..., Any] | None = None, changed: list[tuple[str, Tensor, int]] | None = None
    ) -> Arguments:
        """Return the arguments again; see :meth:`KeptTensor.get`."""
        if self._alone is not None:
            return (self._alone.get(function, "input", changed),), {}
        if self._tree is None:
            return (), {}
        arguments: Arguments = self._tree.build([kept.get(function, "input", changed) for kept in self._tree.tensors])
        return arguments


class Kept(Source):
    """The inputs are kept: a checkpoint. The default.

    Memory: one input for each frame.

    Example:
        >>> import torch
        >>> from recollect.frames import Kept, run_frame
        >>> layers = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Tanh(), torch.nn.Tanh())
        >>> x = torch.randn(3, requires_grad=True)
        >>> run_frame(layers, (x,), {}, Kept()).sum().backward()  # x is kept, and no output of a layer
        >>> torch.equal(x.grad, torch.autograd.grad(layers(x).sum(), x)[0])
        True
    """

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """See :class:`Source`."""
        return KeptCall(args, kwargs)


class KeptCall(Held):
    """The arguments of one call."""

    __slots__ = ("_arguments", "_changed")
    makes_leaves = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = KeptArguments((args, kwargs))
        self._changed: list[tuple[str, Tensor, int]] = []

    def inputs(self) -> Arguments:
        """Return the kept arguments."""
        self._changed = []
        return self._arguments.get(None, self._changed)

    def changed(self) -> list[tuple[str, Tensor, int]]:
        """Return those that were changed in place since."""
        changed, self._changed = self._changed, []
        return changed


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share their memory."""
    return next((key_of(storage) for storage in storages_of(tensor)), id(tensor))


class Layout:
    """What a tensor was like beside its values and shape: compiled blocks and autograd go by it.

    Args:
        tensor: of the forward pass; it is not kept.
    """

    __slots__ = ("_mesh", "_placements", "_strides", "attributes", "dtype", "requires_grad")

    def __init__(self, tensor: Tensor) -> None:
        has_strides = tensor.layout is torch.strided and not tensor.is_nested
        self._strides = tensor.stride() if has_strides else None
        self.dtype = tensor.dtype
        self.requires_grad = tensor.requires_grad
        self.attributes = attributes_of(tensor)
        self._placements = getattr(tensor, "placements", None)  # of a DTensor
        self._mesh = None if self._placements is None else tensor.device_mesh  # type: ignore[attr-defined]

    def give(self, tensor: Tensor) -> Tensor:
        """Return the values in this layout, without history.

        Expanded layouts (elements that share memory) cannot be written to; they stay dense, and so do tensors that are
        not strided, and subclasses where memory has gaps.
        """
        if (
            type(tensor) is Tensor
            and tensor.dtype is self.dtype
            and self._placements is None
            and (self._strides is None or tensor.stride() == self._strides)
        ):
            return tensor.detach()
        with torch.no_grad():
            tensor = tensor.detach().to(self.dtype)
            if self._placements is not None and tensor.placements != self._placements:  # type: ignore[attr-defined]
                tensor = tensor.redistribute(self._mesh, self._placements)  # type: ignore[attr-defined]
            strides = self._strides
            if strides is None or tensor.stride() == strides or 0 in strides:
                return tensor
            if type(tensor) is Tensor:
                return torch.empty_strided(tensor.shape, strides, dtype=self.dtype, device=tensor.device).copy_(tensor)
            order = sorted(range(tensor.dim()), key=lambda i: -strides[i])
            return tensor.permute(order).contiguous().permute([order.index(i) for i in range(tensor.dim())])

    def fresh(self, tensor: Tensor) -> Tensor:
        """Return the values as a leaf in this layout, with the flags and attributes."""
        fresh = self.give(tensor)
        if fresh is tensor or self.requires_grad:
            fresh = fresh.detach().requires_grad_(self.requires_grad)
        if self.attributes:
            fresh.__dict__.update(self.attributes)
        return fresh
