"""Inputs by the inverse of the function, from its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import Certify, pack
from recollect.frames._certificate import (
    GROSS,
    Certificate,
    Figures,
    certificate_of_process,
    check_block,
    is_gross,
    judge,
    tolerance_of,
)
from recollect.frames._chain import Slot, Stage, slot_of, whole
from recollect.frames._drift import DriftGauge
from recollect.frames._errors import InPlaceError, RebuildError, describe, naming
from recollect.frames._fingerprint import Fingerprint, difference, fingerprint, is_finite, is_late, norm_of
from recollect.frames._frame import run_frame
from recollect.frames._modes import local
from recollect.frames._region import Region
from recollect.frames._watch import version_of
from recollect.frames.sources._kept import KeptArguments, Layout, storage_of
from recollect.frames.sources._source import Arguments, Held, Source

__all__ = ["Inverse", "amplified", "moved", "run_invertible"]

# Relative error above which a function that is applied to what its inverse returned is not that of the inverse; in
# units of the rounding of the dtype.
_ILL_CONDITIONED = 30.0


class Inverse(Source):
    """The inputs are recollected from the outputs, by the inverse; nothing is kept but a chain's last outputs.

    Checkpoints with an inverse whose outputs are the next one's inputs form a chain.

    Args:
        function: the inverse: called as ``function(*outputs)``; returns the arguments again, in order (those that it
            need not return may be cut off at the end if they are kept).
        keep: input tensors that stay in memory although there is an inverse.
        inverted: how many leading arguments ``function`` brings back; it then takes the outputs followed by the other
            arguments, which are kept. ``None``: all of them, from the outputs alone.
        takes: ``function`` gets ``outputs[:takes]``, and the others are not kept for it.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        moves: the function moves values and changes none, so that what is exact stays so.

    Raises:
        TypeError: ``function`` cannot be called.

    Example:
        >>> import torch
        >>> from recollect.frames import Inverse, run_frame
        >>> x = torch.ones(3, requires_grad=True)
        >>> y = run_frame(torch.exp, (x * 1,), {}, Inverse(torch.log))  # x * 1 is dropped
        >>> y.sum().backward()
        >>> torch.allclose(x.grad, torch.ones(3).exp())
        True
    """

    def __init__(
        self,
        function: Callable[..., Any],
        keep: Iterable[Tensor] = (),
        *,
        inverted: int | None = None,
        takes: int | None = None,
        gauge: DriftGauge | None = None,
        anchor_every: int | None = None,
        moves: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"inverse must be a function of the outputs (got {function!r})")
        self.function = function
        self.tensors = tuple(keep)
        self.inverted = inverted
        self.takes = takes
        self.gauge = gauge
        self.anchor_every = anchor_every
        self.moves = moves

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """See :class:`Source`."""
        return _InverseStage(self, (args, kwargs))


def run_invertible(
    function: Callable[..., Any],
    inverse: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    seed: bool = True,
    keep: Iterable[Tensor] = (),
    inverted: int | None = None,
    takes: int | None = None,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    moves: bool = False,
    certify: Certify = True,
    certificate: Certificate | None = None,
) -> Any:
    """Run an invertible function as a stage of a chain; see :func:`~recollect.checkpoint`.

    Args:
        function: takes ``args`` and ``kwargs``.
        inverse: takes the outputs of ``function``, and ``kwargs``, and returns ``args`` again.
        args: positional arguments. Floating-point tensors are dropped unless ``keep`` names them or they are returned
            as they are; everything else is kept.
        kwargs: keyword arguments, which are kept.
        seed: replay random state.
        keep: input tensors to keep.
        inverted: how many leading arguments ``inverse`` brings back; it then takes the outputs followed by the other
            arguments, which are kept. ``None``: all of them, from the outputs alone.
        takes: ``inverse`` gets ``outputs[:takes]``, and the others are not kept for it.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        moves: the function moves values and changes none.
        certify: what is accepted of a rebuild.
        certificate: where it is counted.

    Returns:
        What the function returns.

    Raises:
        TypeError: ``inverse`` is no function.
        RebuildError: in backward, what comes back is not what the forward saw.

    Example:
        >>> import torch
        >>> from recollect.frames import run_invertible
        >>> x = torch.ones(3, requires_grad=True)
        >>> y = run_invertible(torch.exp, torch.log, (x * 1,))
        >>> y.sum().backward()
        >>> torch.allclose(x.grad, torch.ones(3).exp())
        True
    """
    source = Inverse(
        inverse,
        keep,
        inverted=inverted,
        takes=takes,
        gauge=gauge,
        anchor_every=anchor_every,
        moves=moves,
    )
    return run_frame(function, args, kwargs or {}, source, seed=seed, certify=certify, certificate=certificate)


class _Dropped:
    """What is known of an argument that was dropped."""

    __slots__ = ("layout", "mark", "position", "shape")

    def __init__(self, position: int, tensor: Tensor, mark: Fingerprint | None) -> None:
        self.position = position
        self.shape = tensor.shape
        self.layout = Layout(tensor)
        self.mark = mark


class _InverseStage(Stage, Held):
    """One invertible function of a chain: a frame whose inputs are the inverse of its outputs."""

    __slots__ = (
        "_arguments", "_certificate", "_certify", "_errors", "_gauge", "_gross", "_inverted", "_kept", "_layouts",
        "_leading", "_region", "_source", "_taken",
    )  # fmt: skip
    whole = True
    makes_leaves = True

    @property
    def drifts(self) -> bool:  # type: ignore[override]
        """Whether some arguments come back by the inverse."""
        return self._kept is None or bool(self._layouts)

    def __init__(self, source: Inverse, arguments: Arguments) -> None:
        super().__init__()
        self._source = source
        self._leading = source.inverted
        self._certify: Certify = True
        self._certificate = certificate_of_process
        self._gauge = source.gauge
        self._region: Region
        self._arguments: Arguments | None = arguments  # until the forward is over
        self._layouts: list[_Dropped] = []  # of the arguments that only the inverse brings back
        self._kept: KeptArguments | None = None
        self._inverted: list[Tensor] | None = None
        self._taken: list[Fingerprint | None] = []  # of the outputs, as they came back
        self._errors = (0.0, 0.0)  # of what came back: the outputs, and the inputs made of them
        self._gross = 0.0

    # Forward.

    def begins(self, region: Region) -> None:
        """Take notice of the region."""
        self._region = region
        self._certify = region.certify
        self._certificate = region.certificate if region.certificate is not None else certificate_of_process
        if self._gauge is None:
            self._gauge = DriftGauge(region.function)

    def returned(self, output: Any) -> None:
        """Decide which inputs are dropped, and take the stage's place in the chain."""
        assert self._arguments is not None
        arguments, self._arguments = self._arguments, None
        args, name, function = arguments[0], self._region.name, self._region.function
        outputs = pack(output)
        if any(isinstance(o, dict) for o in outputs):
            raise TypeError(
                f"{name}: an invertible function returns a tensor, or a tuple whose items its inverse "
                f"takes as arguments (got {', '.join(type(o).__name__ for o in outputs)})"
            )
        source = self._source
        stay = {storage_of(t) for t in source.tensors}
        returned = frozenset(id(o) for o in outputs if isinstance(o, Tensor))
        dropped = [
            i
            for i, arg in enumerate(args[: self._leading])
            if _can_drop(arg) and storage_of(arg) not in stay and not (local.policy and id(arg) in returned)
        ]
        self._kept = KeptArguments(arguments, frozenset(dropped))
        if not dropped or not any(isinstance(o, Tensor) and o.requires_grad for o in outputs):
            return
        inputs = [args[i] for i in dropped]
        self._layouts = [_Dropped(i, args[i], self._mark_of(args[i])) for i in dropped]
        before = slot_of(inputs[0]) if source.moves and len(inputs) == 1 else None
        digits = None if before is None else before.digits
        position = self.join(
            inputs,
            returned=returned,
            gauge=self._gauge,
            anchor_every=source.anchor_every,
            digits=digits,
            function=function,
        )
        for tensor in outputs[: source.takes]:
            if not isinstance(tensor, Tensor):
                self.outputs.append(tensor)
            elif id(tensor) in returned and (slot := self.passes(tensor)) is not None:
                self.outputs.append(slot)
            elif any(tensor is a for a in args):
                self.outputs.append(tensor.detach())
            else:
                slot = Slot(tensor, position + 1, function)
                slot.mark = self._fingerprint(tensor)
                slot.digits = digits
                self.outputs.append(slot)
        if local.policy is not None:
            local.policy.closed(self, inputs, outputs, name)

    def _mark_of(self, tensor: Tensor) -> Fingerprint | None:
        slot = slot_of(tensor)
        if slot is not None and slot.mark is not None:
            return slot.mark
        return self._fingerprint(tensor)

    def _fingerprint(self, tensor: Tensor) -> Fingerprint | None:
        return fingerprint(tensor, exact=self._certify == "exact") if self._certify else None

    def _difference(self, then: Fingerprint | None, tensor: Tensor) -> float:
        return difference(then, tensor, exact=self._certify == "exact")

    # Backward: what the frame holds.

    def inputs(self) -> Arguments:
        """Return the arguments, the dropped ones by the inverse."""
        if self._kept is None:
            raise RuntimeError(f"{self._region.name}: asked for gradients before its forward pass ended")
        args, kwargs = self._kept.get(self._region.function)
        if self._layouts:
            full = list(args)
            for layout, tensor in zip(self._layouts, self._invert((args, kwargs)), strict=True):
                full[layout.position] = layout.layout.fresh(tensor)
            args = tuple(full)
        return args, kwargs

    def compared(self, error: float) -> None:
        """Take notice of how far what autograd saves differs."""
        self._gross = error

    def evaluated(self, output: Any) -> None:
        """Compare with the forward, and pass the inputs on to the stages before."""
        if self._layouts:
            self._check_function(pack(output))
            self.invert()

    def holds_outputs(self) -> bool:
        """Whether the inverse has run already."""
        return self._inverted is not None

    def solve(self) -> None:
        """Bring the inputs back; see :class:`~recollect.frames._chain.Stage`."""
        tensors = self._invert(self._kept.get(self._region.function) if self._kept is not None else ((), {}))
        self._inverted = None
        self.hand_back(tensors, tensors)

    def _invert(self, arguments: Arguments) -> list[Tensor]:
        if self._inverted is None:
            values = [whole(o.take()) if isinstance(o, Slot) else o for o in self.outputs]
            versions = [(o, version_of(o)) for o in map(_held, self.outputs) if o is not None]
            self._taken = [self._fingerprint(v) if isinstance(v, Tensor) else None for v in values]
            self._inverted = self._apply_inverse(values, arguments)
            for tensor, version in versions:
                if version_of(tensor) != version:
                    raise InPlaceError(
                        f"{self._region.name}: its inverse changed in place its argument of shape "
                        f"{list(tensor.shape)}, an output that is still held; compute a new tensor instead (y / 2, not "
                        "y.div_(2))"
                    )
            if self._certify:
                try:
                    self._check_inverse(values, arguments)
                except RebuildError:
                    self._inverted = None  # or another attempt would take it as it is
                    raise
        return self._inverted

    def _apply_inverse(self, values: Sequence[Any], arguments: Arguments) -> list[Tensor]:
        args, kwargs = arguments
        given = tuple(values) if self._leading is None else (*values, *args[self._leading :])
        inverse = torch.no_grad()(self._source.function)
        returned = pack(self._region.again((given, kwargs), self.scope, nullcontext(), inverse))
        return [self._fit(layout, returned) for layout in self._layouts]

    def _fit(self, layout: _Dropped, returned: tuple[Any, ...]) -> Tensor:
        """Check what the inverse returned for an argument, and give it the forward's layout."""
        i, shape = layout.position, layout.shape
        tensor = returned[i] if i < len(returned) else None
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            found = f"a tensor of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise RebuildError(
                f"{self._region.name}: the inverse {describe(self._source.function)} returned {len(returned)} "
                f"value(s), and {found} for argument {i}, which was a tensor of shape {list(shape)}; it must return "
                "the function's arguments in their order, or keep=(...) must name those that it does not return"
            )
        return layout.layout.give(tensor)

    # Proof.

    def _check_inverse(self, values: Sequence[Any], arguments: Arguments) -> None:
        """Raise unless the inputs are the forward's, but for the drift of the outputs."""
        if any(map(is_late, self._taken)):
            self._check_late()
            return
        given = max(
            (self._difference(o.mark, v) for o, v in zip(self.outputs, values, strict=True) if isinstance(o, Slot)),
            default=0.0,
        )
        assert self._inverted is not None
        if not all(mark is None or is_finite(mark) for mark in self._taken):
            return  # an overflow in the forward pass: there is nothing to prove
        worst = 0.0
        for layout, tensor in zip(self._layouts, self._inverted, strict=True):
            returned = self._difference(layout.mark, tensor)
            worst = max(worst, returned)

            def amplification(tensor: Tensor = tensor, layout: _Dropped = layout) -> float | None:
                index = self._layouts.index(layout)
                step = max(given, self._tolerance(layout.layout.dtype))
                return amplified(
                    tensor, lambda by: self._apply_inverse([moved(v, by) for v in values], arguments)[index], step
                )

            tolerance = self._tolerance(layout.layout.dtype)
            check_block(self._region.name, given, returned, tolerance, amplification, self._certify, self._figures)
        self._errors = (given, worst)

    def _check_function(self, outputs: tuple[Any, ...]) -> None:
        """Raise unless the function, applied to what its inverse returned, returns what that was given."""
        if not self._certify:
            return
        if any(map(is_late, self._taken)):
            exact = self._certify == "exact"
            for taken, tensor in zip(self._taken, outputs, strict=False):
                if isinstance(tensor, Tensor) and taken is not None:
                    allowed = min(_ILL_CONDITIONED * self._tolerance(tensor.dtype), GROSS)
                    judge([(taken, fingerprint(tensor, exact=exact, like=taken))], self._verdict(allowed))
            return
        norms = [norm for norm in map(norm_of, self._taken) if norm < math.inf]
        for taken, tensor in zip(self._taken, outputs, strict=False):
            if not isinstance(tensor, Tensor) or taken is None:
                continue
            if norm_of(taken) <= 10 * self._tolerance(tensor.dtype) * max(norms, default=0.0):
                continue  # a mean that is zero but for rounding, beside other outputs
            error = self._difference(taken, tensor)
            allowed = min(_ILL_CONDITIONED * self._tolerance(tensor.dtype), GROSS)
            check_block(self._region.name, self._errors[1], error, allowed, None, self._certify, self._figures)
        worst = self._errors[1]
        rounding = max((self._tolerance(layout.layout.dtype) for layout in self._layouts), default=0.0)
        if is_gross(self._gross, worst, rounding):
            check_block(
                self._region.name,
                self._errors[1],
                self._gross,
                rounding,
                None,
                self._certify,
                self._figures,
            )

    def _check_late(self) -> None:
        """Do as :meth:`_check_inverse` on a device that is not waited for."""
        assert self._inverted is not None
        exact = self._certify == "exact"
        outputs = [(o.mark, taken) for o, taken in zip(self.outputs, self._taken, strict=True) if isinstance(o, Slot)]
        for layout, tensor in zip(self._layouts, self._inverted, strict=True):
            now = fingerprint(tensor, exact=exact, like=layout.mark)
            allowed = min(_ILL_CONDITIONED * self._tolerance(layout.layout.dtype), GROSS)
            judge([*outputs, (layout.mark, now)], self._verdict(allowed))

    def _verdict(self, allowed: float) -> Callable[[list[float]], None]:
        certify, figures, name = self._certify, self._figures, naming(self._region.function)

        def verdict(errors: list[float]) -> None:
            given = max(errors[:-1], default=0.0)
            check_block(name(), given, errors[-1], allowed, None, certify, figures)

        return verdict

    @property
    def _figures(self) -> Figures:
        return self._certificate.figures

    def _tolerance(self, dtype: torch.dtype) -> float:
        return max(tolerance_of(dtype), self._region.tolerance)


def amplified(tensor: Tensor, evaluate: Callable[[float], Tensor], step: float) -> float | None:
    """Return how many times larger an error of a result is than a small one of what it is computed from.

    Args:
        tensor: the result.
        evaluate: computes it again, from values with a relative error.
        step: that relative error.

    Returns:
        ``None`` if without an error the result is another.
    """
    wide = torch.promote_types(tensor.dtype, torch.float64)
    result = tensor.to(wide)
    norm = result.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if float((evaluate(0.0).to(wide) - result).norm() / norm) > tolerance_of(tensor.dtype) / 10:
        return None
    return float((evaluate(step).to(wide) - result).norm() / norm) / step


def moved(value: Any, step: float) -> Any:
    """Return a tensor with a relative error of ``step``, always the same."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    signs = torch.arange(value.numel(), device=value.device).mul_(2654435761).bitwise_and_(1 << 20).ne_(0)
    return value + value * (signs.view(value.shape).to(value.dtype) * 2 - 1) * step


def _can_drop(arg: Any) -> bool:
    """Whether keeping an argument would cost memory that its inverse can save.

    A leaf that requires grad stays alive as long as the graph does (but in a rebuild of a surrounding region, whose
    inputs are leaves that were none in the forward); integer and sparse tensors describe the problem
    (indices, graphs) and come back from nowhere.
    """
    return (
        isinstance(arg, Tensor)
        and arg.layout in (torch.strided, torch.jagged)
        and (arg.is_floating_point() or arg.is_complex())
        and (local.policy is not None or local.scope is not None or not (arg.is_leaf and arg.requires_grad))
    )


def _held(output: Any) -> Tensor | None:
    """The tensor of the forward pass, if somebody but the chain may read it."""
    tensor = output.tensor() if isinstance(output, Slot) else output
    return tensor if isinstance(tensor, Tensor) else None
