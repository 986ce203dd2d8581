"""Checkpoints: one frame around a function, with kept inputs or with the function's inverse as the source."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import pack
from recollect.frames._certificate import Certificate, Certify
from recollect.frames._chain import Parts, Slot, slot_of
from recollect.frames._describe import describe
from recollect.frames._drift import DriftGauge, DriftProbe
from recollect.frames._eager import Released, release, restore_after_backward
from recollect.frames._errors import InPlaceError, RebuildError
from recollect.frames._frame import Frame
from recollect.frames._keep import KeptArguments, devices_of, laid_out, storage_of
from recollect.frames._modes import enclosing, frames_apply, local
from recollect.frames._modules import version_of
from recollect.frames._region import Region

__all__ = ["checkpoint", "run_invertible"]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    seed: bool = True,
    enabled: bool = True,
    inverse: Callable[..., Any] | None = None,
    keep: Iterable[Tensor] = (),
    certify: Certify = True,
    **kwargs: Any,
) -> Any:
    """Run ``function(*args)`` without keeping what autograd saves in it; rebuild that when backward asks for it.

    Without ``inverse`` the inputs are kept, and the function is run again from them. With ``inverse`` the inputs are
    not kept either: they are recollected from the outputs. Checkpoints with an inverse whose outputs are the next one's
    inputs form a chain, which keeps its last outputs only.

    The rebuild repeats the forward: random state of the CPU and of the inputs' devices, autocast, training flags and
    parameters are those of the forward, and buffers such as BatchNorm's running statistics are updated once.
    Any number of backward passes, ``torch.autograd.grad``, double backward and ``is_grads_batched`` work as without.
    Where nothing is saved for backward (no grad, inference mode) or saved-tensor hooks do not exist (torch.func,
    whole-model torch.compile), the function runs plain.

    Args:
        function: takes and returns tensors, tuples of tensors, or anything else.
        *args: positional arguments; tensors within lists, tuples and dicts are seen too.
        seed: replay random state in rebuilds. Needed for dropout's gradient to be right.
        enabled: with ``False`` the function runs plain.
        inverse: called as ``inverse(*outputs)``; returns the arguments again, in order (those that it need not return
            may be cut off at the end if they are kept).
        keep: input tensors that stay in memory although there is an inverse.
        certify: whether what is rebuilt is compared with the forward.
        **kwargs: keyword arguments of the function.

    Returns:
        What the function returns.

    Raises:
        TypeError: ``inverse`` cannot be called.
        InPlaceError: in backward, when an input, output or parameter was changed in place since the forward.
        RebuildError: in backward, when the function saved other tensors than in the forward, or the inverse did not
            return the inputs.
        GraphFreedError: on a second backward without ``retain_graph=True`` in the first.

    Example:
        >>> import torch, recollect
        >>> x = torch.randn(4, requires_grad=True)
        >>> recollect.checkpoint(torch.sin, x).sum().backward()
        >>> torch.allclose(x.grad, torch.cos(x))
        True
    """
    if inverse is not None and not callable(inverse):
        raise TypeError(f"inverse must be a function of the outputs (got {inverse!r})")
    function = functools.partial(function, **kwargs) if kwargs else function
    if not enabled or not frames_apply():
        return function(*args)
    if inverse is None:
        region = Region(function, seed)
        return Frame(region, _KeptSource(region, args)).run(args, devices_of(args))
    return run_invertible(function, inverse, args, seed=seed, keep=keep, gauge=DriftGauge(function))


class _KeptSource:
    """The frame's inputs, kept."""

    __slots__ = ("_args", "_region")

    def __init__(self, region: Region, args: tuple[Any, ...]) -> None:
        self._region = region
        self._args = KeptArguments(args)

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Return the kept inputs."""
        return tuple(self._args.get(self._region.function))

    def evaluated(self, index: int, output: Any) -> None:
        """Nothing depends on the output."""


def run_invertible(
    function: Callable[..., Any],
    inverse: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: bool = True,
    keep: Iterable[Tensor] = (),
    inverted: int | None = None,
    takes: int | None = None,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    certify: Certify = True,
    certificate: Certificate | None = None,
) -> Any:
    """Run an invertible function as a stage of a chain; see :func:`checkpoint`.

    Args:
        function: takes ``args``.
        inverse: takes the outputs of ``function`` and returns ``args`` again.
        args: positional arguments. Floating-point tensors are dropped unless ``keep`` names them or they are returned
            as they are; everything else is kept.
        seed: replay random state.
        keep: input tensors to keep.
        inverted: how many leading arguments ``inverse`` brings back; it then takes the outputs followed by the other
            arguments, which are kept. ``None``: all of them, from the outputs alone.
        takes: ``inverse`` gets ``outputs[:takes]``, and the others are not kept for it.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        kwargs: keyword arguments of both functions, which are kept.
        certify: whether what is rebuilt is compared with the forward.
        certificate: where the figures of the comparison go.
    """
    if kwargs:
        function, inverse = functools.partial(function, **kwargs), functools.partial(inverse, **kwargs)
    region = Region(function, seed)
    stage = _InverseStage(region, inverse, inverted, takes)
    output = Frame(region, stage, lock=stage.lock).run(args, devices_of(args))
    stage.close(args, output, keep, gauge, anchor_every)
    return output


class _InverseStage:
    """One invertible function of a chain: a frame whose inputs are the inverse of its outputs."""

    __slots__ = (
        "__weakref__", "_dropped", "_inverse", "_inverted", "_kept", "_layouts", "_leading", "_outputs", "_passed",
        "_probe", "_region", "_released", "_scope", "_slots", "_takes", "lock",
    )  # fmt: skip

    def __init__(self, region: Region, inverse: Callable[..., Any], inverted: int | None, takes: int | None) -> None:
        self.lock = threading.RLock()
        self._region = region
        self._inverse = inverse
        self._leading = inverted
        self._takes = takes
        self._scope = enclosing()
        self._dropped: list[int] = []  # positions of the arguments that only the inverse brings back
        self._layouts: list[tuple[torch.Size, tuple[int, ...], torch.dtype, bool]] = []
        self._slots: list[weakref.ref[Slot] | None] = []  # of the dropped arguments
        self._kept: KeptArguments | None = None
        self._outputs: list[Any] = []  # slots of tensors, everything else as it is
        self._passed: list[Slot] = []
        self._probe: DriftProbe | None = None
        self._inverted: list[Tensor] | None = None
        self._released: list[Released | None] = []

    # Forward.

    def close(
        self,
        args: tuple[Any, ...],
        output: Any,
        keep: Iterable[Tensor],
        gauge: DriftGauge | None,
        anchor_every: int | None,
    ) -> None:
        """Decide which inputs are dropped, and take the stage's place in the chain."""
        outputs = pack(output)
        if any(isinstance(o, dict) for o in outputs):
            raise TypeError(
                f"{self._region.name}: an invertible function returns a tensor, or a tuple whose items its inverse "
                f"takes as arguments (got {', '.join(type(o).__name__ for o in outputs)})"
            )
        stay = {storage_of(t) for t in keep}
        returned = {id(o) for o in outputs if isinstance(o, Tensor)}
        for i, arg in enumerate(args[: self._leading]):
            if _can_drop(arg) and storage_of(arg) not in stay and not (local.eager and id(arg) in returned):
                self._dropped.append(i)
        self._kept = KeptArguments(args, frozenset(self._dropped))
        if not self._dropped or not any(isinstance(o, Tensor) and o.requires_grad for o in outputs):
            return
        position, anchored, heads = 0, False, []
        passed: dict[int, Slot] = {}  # of arguments that are returned as they are: whoever reads them next is asked
        for i in self._dropped:
            arg = args[i]
            self._layouts.append((arg.shape, arg.stride(), arg.dtype, arg.requires_grad))
            before = slot_of(arg)
            heads.append(before is None)
            if id(arg) in returned and (before is None or before.maker is None):
                passed[id(arg)] = before = before or Slot(arg, 0, self._region.function)
                self._passed.append(before)
            keep_it = before is not None and anchor_every is not None and before.position % anchor_every == 0
            if before is not None:
                if id(arg) not in returned:
                    before.link(self, keep=keep_it)
                position = max(position, before.position)
            self._slots.append(weakref.ref(before) if before is not None else None)
            anchored = anchored or keep_it
        if gauge is not None and (anchored or all(heads)):
            self._probe = DriftProbe([args[i] for i in self._dropped], gauge)
        for tensor in outputs[: self._takes]:
            if not isinstance(tensor, Tensor):
                self._outputs.append(tensor)
            elif id(tensor) in passed:
                self._outputs.append(passed[id(tensor)])
            elif any(tensor is a for a in args):
                self._outputs.append(tensor.detach())
            else:
                self._outputs.append(Slot(tensor, position + 1, self._region.function))
        if local.eager:
            self._released = [release(args[i], self._region.name) for i in self._dropped]
            restore_after_backward(outputs, self._released, self.invert)

    # Backward: the source of the frame.

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Return the arguments, the dropped ones by the inverse."""
        if self._kept is None:
            raise RuntimeError(f"{self._region.name}: asked for gradients before its forward pass ended")
        args = self._kept.get(self._region.function)
        if self._dropped:
            inverted = self._invert(args)
            for i, tensor, (*_, requires_grad) in zip(self._dropped, inverted, self._layouts, strict=True):
                args[i] = tensor.detach().requires_grad_(requires_grad)
        return tuple(args)

    def evaluated(self, index: int, output: Any) -> None:
        """Pass the inputs on to the stages before."""
        if self._dropped:
            self.invert()

    def _invert(self, args: list[Any]) -> list[Tensor]:
        if self._inverted is None:
            outputs = tuple(_whole(o.take()) if isinstance(o, Slot) else o for o in self._outputs)
            if self._leading is not None:
                outputs += tuple(args[self._leading :])
            inverse = torch.no_grad()(self._inverse)
            versions = [(o, version_of(o)) for o in map(_held, self._outputs) if o is not None]
            returned = pack(self._region.again(outputs, self._scope, nullcontext(), inverse))
            self._check_untouched(versions)
            self._inverted = [
                self._fit(i, returned, *layout) for i, layout in zip(self._dropped, self._layouts, strict=True)
            ]
            for released, tensor in zip(self._released, self._inverted, strict=False):
                if released is not None:
                    released.restore(tensor)
        return self._inverted

    def _check_untouched(self, versions: list[tuple[Tensor, int]]) -> None:
        """Raise if the inverse has written to an output that somebody else reads."""
        for tensor, version in versions:
            if version_of(tensor) != version:
                raise InPlaceError(
                    f"{self._region.name}: its inverse changed in place its argument of shape {list(tensor.shape)}, an "
                    "output that is still held; compute a new tensor instead (y / 2, not y.div_(2))"
                )

    def _fit(
        self,
        i: int,
        returned: tuple[Any, ...],
        shape: torch.Size,
        strides: tuple[int, ...],
        dtype: torch.dtype,
        _: bool,
    ) -> Tensor:
        """Check what the inverse returned for argument ``i``, and give it the forward's layout."""
        tensor = returned[i] if i < len(returned) else None
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            found = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise RebuildError(
                f"{self._region.name}: the inverse {describe(self._inverse)} returned {len(returned)} value(s), and "
                f"{found} for argument {i}, which was a tensor of shape {list(shape)}; it must return the function's "
                "arguments in their order, or keep=(...) must name those that it does not return"
            )
        return laid_out(tensor.detach(), strides, dtype)

    # Backward: the stage of the slots.

    def missing(self) -> list[Slot]:
        """See :class:`~recollect.frames._chain.Stage`."""
        return [o for o in self._outputs if isinstance(o, Slot)] if self._inverted is None else []

    def invert(self) -> None:
        """See :class:`~recollect.frames._chain.Stage`."""
        with self.lock:
            tensors = self._invert(self._kept.get(self._region.function) if self._kept is not None else [])
            self._inverted = None
            if self._probe is not None:
                self._probe.measure(tensors)
            for reference, tensor in zip(self._slots, tensors, strict=True):
                slot = reference() if reference is not None else None
                if slot is not None and (slot.maker is self or slot in self._passed):
                    slot.offer(tensor)


def _can_drop(arg: Any) -> bool:
    """Whether keeping an argument would cost memory that its inverse can save.

    A leaf that requires grad stays alive as long as the graph does (but in a rebuild of a surrounding region, whose
    inputs are leaves that were none in the forward); integer and sparse tensors describe the problem
    (indices, graphs) and come back from nowhere.
    """
    return (
        isinstance(arg, Tensor)
        and arg.layout is torch.strided
        and (arg.is_floating_point() or arg.is_complex())
        and (local.eager or local.scope is not None or not (arg.is_leaf and arg.requires_grad))
    )


def _held(output: Any) -> Tensor | None:
    """The tensor of the forward pass, if somebody but the chain may read it."""
    tensor = output.tensor() if isinstance(output, Slot) else output
    return tensor if isinstance(tensor, Tensor) else None


def _whole(value: Tensor | Parts) -> Tensor:
    return value.whole() if isinstance(value, Parts) else value
