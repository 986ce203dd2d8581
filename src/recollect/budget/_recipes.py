"""What cheap functions return is not kept: it is computed again from what is kept anyway.

A norm and an activation save their inputs, and what they return is saved once more by the product behind them. While a
unit runs, a mode sees the functions that it calls. What one of those below returns has a *recipe*: the function, and
its arguments, each of which is a parameter, a tensor that autograd saves in the unit, or has a recipe itself. Saved
tensors that have one are dropped, and made anew when backward asks. Nothing else runs again. The functions are known,
and so are their arguments, with their versions; for what is written without a count (``.data``), what is made anew is
compared with what was dropped.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from recollect._arguments import Certify
from recollect._torch import autocast_as, autocast_now, is_batched, outside_transforms
from recollect.frames import InPlaceError, Mark

__all__ = ["has_recipe", "run_sparingly"]

_SMALL = 4096  # bytes; fewer are kept


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _not_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call that leaves its input, of which others may wait for the same, as it is."""
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    return function, tuple(False if value is True else value for value in args), kwargs


def _batch_norm(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call without running statistics where they make no difference, and move."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("training", False):
        given["running_mean"] = given["running_var"] = None
    return F.batch_norm, (), given


def _same(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return function, args, kwargs


def _named(home: Any, names: str) -> list[Any]:
    return [getattr(home, name) for name in names.split() if hasattr(home, name)]


_CHEAP: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Call]] = {
    **dict.fromkeys(_named(F, "layer_norm group_norm rms_norm gelu softplus logsigmoid"), _same),
    **dict.fromkeys(_named(torch, "layer_norm group_norm rms_norm relu sigmoid tanh mul square"), _same),
    **dict.fromkeys(_named(Tensor, "relu sigmoid tanh mul __mul__ square"), _same),
    **dict.fromkeys(
        _named(F, "relu relu6 leaky_relu elu celu selu silu mish hardtanh hardswish hardsigmoid"), _not_in_place
    ),
    F.batch_norm: _batch_norm,
}
"""Functions that draw nothing, write to nothing and cost little, or the calls that compute the same and do not."""


class _Slot:
    """What autograd holds instead of a tensor that it saves: the tensor, or how it is made again."""

    __slots__ = ("__weakref__", "layout", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.recipe: _Recipe | None = None
        self.layout: tuple[Any, ...] = ()

    def cook(self, recipe: _Recipe, mark: Callable[[Tensor], Mark]) -> None:
        """Drop the tensor, for which there is a recipe whose ingredients are still there."""
        if recipe.hold():
            tensor, self.tensor, self.recipe = self.tensor, None, recipe
            assert tensor is not None
            recipe.note(tensor, mark)
            self.layout = tensor.shape, tensor.stride(), tensor.storage_offset()
            recipe.users.append(weakref.ref(self))

    def get(self) -> Tensor:
        if self.recipe is not None:
            return self.recipe.handed_to(self).as_strided(*self.layout)
        assert self.tensor is not None
        _check(self.tensor, self.version)
        return self.tensor


def _check(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise InPlaceError(
            f"a tensor of shape {list(tensor.shape)} that backward needs was changed in place between the forward pass "
            f"(version {version}) and backward (version {tensor._version}), a parameter most often by an optimizer "
            "step; call backward before the step, and change a copy instead (x = x + 1, not x += 1)"
        )


class _Recipe:
    """How a tensor is made again.

    Attributes:
        dtype: of it.
        users: slots that wait for it.
    """

    __slots__ = (
        "_args", "_autocast", "_function", "_kwargs", "_layout", "_made", "_mark", "_waiting", "dtype", "users",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], output: Tensor) -> None:
        self._function = function
        self._args = args  # tensors as what is known of them
        self._kwargs = kwargs
        self._layout = output.shape, output.stride()
        self._mark: Mark | None = None  # of what somebody waits for
        self.dtype = output.dtype
        self._autocast = autocast_now({"cpu", output.device.type})
        self._made: Tensor | None = None
        self._waiting: set[int] = set()
        self.users: list[weakref.ref[_Slot]] = []

    def handed_to(self, slot: _Slot) -> Tensor:
        """Return the tensor; it stays until all who wait for it have it."""
        made = self._made
        if made is None:
            made = self._made = self.make()
            self._waiting = {id(user) for reference in self.users if (user := reference()) is not None}
        self._waiting.discard(id(slot))
        if not self._waiting:
            self._made = None
        return made

    def note(self, tensor: Tensor, mark: Callable[[Tensor], Mark]) -> None:
        """Take notice of what it makes, of which a tensor that is dropped is a view, or all."""
        if self._mark is None:
            with torch.no_grad():
                self._mark = mark(tensor.detach().as_strided(*self._layout, 0))

    def hold(self) -> bool:
        """Keep what it is made of from now on; return whether all of it is still there."""
        return all(value.hold() for value in (*self._args, *self._kwargs.values()) if type(value) is _Known)

    def make(self) -> Tensor:
        """Compute it."""
        if self._made is not None:
            return self._made
        cast = self._autocast != autocast_now(kind for kind, _, _ in self._autocast)
        with (
            torch.no_grad(),
            outside_transforms() if is_batched() else nullcontext(),
            autocast_as(self._autocast) if cast else nullcontext(),
        ):
            made: Tensor = self._function(
                *map(_value, self._args), **{name: _value(value) for name, value in self._kwargs.items()}
            )
            if made.stride() != self._layout[1]:
                made = torch.empty_strided(*self._layout, dtype=made.dtype, device=made.device).copy_(made)
            if self._mark is not None:
                self._mark.check(made)
        return made


class _Known:
    """A tensor among the arguments of a recipe: a leaf, one that autograd saves, or one with a recipe; or a view of it.

    Args:
        tensor: the argument.
        source: the recipe, or what autograd holds, which is not kept longer until the recipe is needed; ``None``: a
            leaf, which lasts.
    """

    __slots__ = ("_layout", "_recipe", "_slot", "_tensor", "_version")

    def __init__(self, tensor: Tensor, source: _Recipe | _Slot | None) -> None:
        self._tensor = tensor if source is None else None
        self._slot = weakref.ref(source) if isinstance(source, _Slot) else None
        self._recipe = source if isinstance(source, _Recipe) else None
        self._layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        self._version = tensor._version

    def hold(self) -> bool:
        """Keep the tensor from now on; return whether it is still there."""
        if self._recipe is not None:
            return self._recipe.hold()
        if self._tensor is None and self._slot is not None:
            slot = self._slot()
            if slot is None or slot.tensor is None:
                return False
            with torch.no_grad():
                self._tensor = slot.tensor.detach().as_strided(*self._layout)
        return True

    def get(self) -> Tensor:
        """Return the tensor."""
        if self._recipe is not None:
            return self._recipe.make().as_strided(*self._layout)
        assert self._tensor is not None
        _check(self._tensor, self._version)
        return self._tensor


def _value(argument: Any) -> Any:
    return argument.get() if type(argument) is _Known else argument


_recipes: dict[int, tuple[weakref.ref[Any], int, _Recipe]] = {}
"""By the key of what it makes a storage of: that storage, the version of its contents, and the recipe."""


def _recipe_of(tensor: Tensor) -> _Recipe | None:
    storage = tensor.untyped_storage()
    found = _recipes.get(storage._cdata)
    if found is None or found[0]() is not storage or found[1] != tensor._version:
        return None
    return found[2] if found[2].dtype is tensor.dtype else None


def _remember(output: Tensor, recipe: _Recipe) -> None:
    storage = output.untyped_storage()
    key = storage._cdata

    def forget(reference: weakref.ref[Any]) -> None:
        found = _recipes.get(key)
        if found is not None and found[0] is reference:
            del _recipes[key]

    _recipes[key] = weakref.ref(storage, forget), output._version, recipe


def has_recipe(tensor: Tensor) -> bool:
    """Whether a tensor can be made again from what is kept anyway."""
    return _is_plain(tensor) and _recipe_of(tensor) is not None


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype.is_floating_point
        and not (tensor.is_nested or tensor.is_neg() or tensor.is_inference())
    )


class _Kitchen(TorchFunctionMode):
    """Sees the functions that run in a unit, and what autograd saves."""

    def __init__(self, mark: Callable[[Tensor], Mark]) -> None:
        super().__init__()
        self._mark = mark
        self._saved: dict[int, weakref.ref[_Slot]] = {}  # by their storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = _CHEAP.get(func)
        if call is None:
            return func(*args, **kwargs)
        again, inputs, named = call(func, args, kwargs)
        given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
        if not all(map(_is_plain, given)):
            return func(*args, **kwargs)
        recipes = [_recipe_of(tensor) for tensor in given]
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        if (
            type(output) is not Tensor
            or not output.requires_grad
            or output.nbytes < _SMALL
            or output.nbytes != output.untyped_storage().nbytes()
        ):
            return output
        known: dict[int, _Known] = {}
        for tensor, found, version in zip(given, recipes, versions, strict=True):
            source: _Recipe | _Slot | None = found
            if source is None and not (tensor.is_leaf and tensor.requires_grad):
                source = self._saved_as(tensor)
                if source is None or tensor._version != version:
                    return output
            known[id(tensor)] = _Known(tensor, source)
        recipe = _Recipe(
            again, [known.get(id(value), value) for value in inputs],
            {name: known.get(id(value), value) for name, value in named.items()}, output,
        )  # fmt: skip
        slot = self._saved_as(output)
        if slot is not None:  # autograd saves what the function returns
            slot.cook(recipe, self._mark)
        _remember(output, recipe)
        return output

    def _saved_as(self, tensor: Tensor) -> _Slot | None:
        """Return what autograd holds of the memory of a tensor, in the unit, as it is now."""
        found = self._saved.get(tensor.untyped_storage()._cdata)
        slot = None if found is None else found()
        held = None if slot is None else slot.tensor
        if slot is None or held is None or held.dtype is not tensor.dtype or slot.version != tensor._version:
            return None
        return slot

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd holds of a tensor."""
        base = tensor if tensor.is_leaf else tensor._base
        # What holds an output with its history holds itself.
        slot = _Slot(tensor if base is not None and base.is_leaf else tensor.detach())
        if _is_plain(tensor):
            recipe = _recipe_of(tensor)
            if recipe is not None:
                slot.cook(recipe, self._mark)
            if slot.tensor is not None:
                self._saved[tensor.untyped_storage()._cdata] = weakref.ref(slot)
        return slot


def run_sparingly(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], certify: Certify = True
) -> Any:
    """Run a function; of what autograd saves in it, that which has a recipe is not kept.

    Args:
        function: any callable.
        args: its arguments.
        kwargs: its arguments by name.
        certify: what is accepted of what is computed again.

    Returns:
        What the function returns.

    Raises:
        InPlaceError: in backward, when what is kept was changed in place since.
        RebuildError: in backward, when what is computed again is not what it was.

    Example:
        >>> import torch
        >>> from recollect.budget._recipes import run_sparingly
        >>> from recollect.memory import peak_memory
        >>> block = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> x = torch.randn(64, 64)
        >>> with peak_memory("cpu") as memory:
        ...     y = run_sparingly(block, (x,), {})
        >>> memory.current_bytes == 2 * x.nbytes  # what the first layer returns, and the last
        True
    """
    kitchen = _Kitchen(functools.partial(Mark, function, certify=certify))
    with kitchen, saved_tensors_hooks(kitchen.pack, _Slot.get):
        try:
            return function(*args, **kwargs)
        finally:
            del kitchen._mark  # autograd holds what packs, and that would hold the function
